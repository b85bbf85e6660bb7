"""What the manifest of one world's states says of each."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.checkpoint.format.compat import get_computing_config, get_config_hash
from elastic.checkpoint.format.manifest import BuildManifest, FileRecord, Manifest, TensorRecord
from elastic.checkpoint.train_state import get_mesh_shape
from elastic.config import RunConfig
from elastic.ports import DataIdentity, Progress
from elastic.records.rundir import format_utc


@dataclass(frozen=True, kw_only=True)
class WorldDescription:
    """What all states of one world have in common."""

    config: RunConfig
    data: DataIdentity | None
    device: torch.device
    generation: int
    world_size: int

    def describe(self, state: Mapping[str, Tensor], progress: Progress, extra: Mapping[str, object]) -> BuildManifest:
        """Return what builds the manifest of a state once it is known where its parts lie."""
        manifest = Manifest(
            progress=progress,
            generation=self.generation,
            world_size=self.world_size,
            device=self.device.type,
            mesh=get_mesh_shape(state, self.world_size),
            config=(computing := get_computing_config(self.config, self.data)),
            config_hash=get_config_hash(computing),
            tensors={},
            generators={},
            files={},
            extra=dict(extra),
        )

        def build(index: Mapping[str, TensorRecord], files: Mapping[str, FileRecord]) -> Manifest:
            return replace(
                manifest,
                tensors={name: record for name, record in index.items() if name in state},
                generators={name: record for name, record in index.items() if name not in state},
                files=files,
                saved_utc=format_utc(time.time()),
            )

        return build
