"""The frozen weights that adapters stand beside: read when a model is built, never saved again."""

import torch
import torch.distributed as dist
from torch import nn

from elastic.checkpoint.durable.storage_errors import explain_unreadable
from elastic.checkpoint.exchange import Parcels
from elastic.checkpoint.format.manifest import CommittedCheckpoint, Manifest, is_committed, read_manifest
from elastic.checkpoint.format.sources import StorageSource
from elastic.checkpoint.restore.load import load_state
from elastic.errors import CheckpointError, ConfigError, SolventError
from elastic.records.rundir import BASE
from elastic.storage import Storage

_FOUND = Parcels[Manifest](Manifest)


def load_base(
    storage: Storage, model: nn.Module, *, device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Fill the frozen parameters; each rank reads the bytes of its own part, and verifies them. All ranks call it.

    Raises:
        ConfigError: the run has no frozen weights.
        CheckpointError: they are damaged, or of another shape.
        StorageError: the storage cannot be read.
    """
    frozen = {f"model.{name}": param for name, param in model.named_parameters() if not param.requires_grad}
    shapes = {name: tuple(param.shape) for name, param in frozen.items()}
    in_4_bits = {name for name, param in frozen.items() if param.dtype == torch.uint8}
    manifest = _FOUND.broadcast(_find(storage, shapes, in_4_bits) if dist.get_rank(group) == 0 else None, group)
    if isinstance(manifest, Exception):
        raise manifest
    damage = load_state(frozen, manifest, [StorageSource(storage, BASE)], device=device, group=group)
    if damage:
        raise CheckpointError(
            f"{storage.url}/{BASE} is damaged ({damage}): the frozen weights beside which this run's adapters are "
            "trained, and there are no others. Bring its files back from a copy, or import the model again under "
            "run=<new name>."
        )


def _find(storage: Storage, shapes: dict[str, tuple[int, ...]], in_4_bits: set[str]) -> Manifest | SolventError:
    tune = "qlora" if in_4_bits else "lora"
    try:
        if not is_committed(storage, BASE):
            return ConfigError(
                f"tune={tune} trains adapters beside frozen weights, and {storage.url} has none. Import a model into "
                f"the run first: solvent checkpoint import HF_DIR CONFIG tune={tune}"
            )
        manifest = read_manifest(storage, CommittedCheckpoint(directory=BASE, step=0))
    except OSError as error:
        return explain_unreadable(error, storage.url)
    except SolventError as error:
        return error
    if {name for name, record in manifest.tensors.items() if record.dtype == "U8"} != in_4_bits:
        other_tune = "lora" if in_4_bits else "qlora"
        return ConfigError(
            f"tune={tune}, but the frozen weights in {storage.url} were imported with tune={other_tune}, in another "
            f"form. Set tune={other_tune}, or import the model again under run=<new name>."
        )
    saved = {name: record.shape for name, record in manifest.tensors.items()}
    other = next((name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)), None)
    if other is not None:
        return CheckpointError(
            f"{storage.url}/{BASE}: {other} has the shape {saved.get(other)}, and the model of this run has it as "
            f"{shapes.get(other)} (None: it has none). Use the keys of model and lora in the run's own config.yaml."
        )
    return manifest
