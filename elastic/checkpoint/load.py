"""Restore a run from its newest committed checkpoint, over any number of ranks and any strategy."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from elastic.checkpoint.fit import check_config, check_tensors
from elastic.checkpoint.layout import CommittedCheckpoint, Manifest, find_damage, list_committed, read_manifest
from elastic.checkpoint.state import get_live_state, get_rng_name, get_rng_state, set_rng_state
from elastic.config import RunConfig
from elastic.errors import CheckpointError, SolventError
from elastic.ports import Progress
from elastic.rundir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was restored beside the state itself; `extra` is what the caller gave when it was saved."""

    progress: Progress
    extra: Mapping[str, Any]
    path: Path


def restore(
    run_dir: RunDir,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: RunConfig,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Restored | None:
    """Write the newest committed state into model and optimizer, in place; None when nothing is committed.

    Rank 0 chooses and all ranks load the same. A damaged checkpoint is passed over with a warning. The learning rate
    and other hyperparameters of the optimizer stay what the configuration made them.

    Args:
        device: where the state lies.
        group: all ranks, unused by anyone else meanwhile; the default group if None.

    Raises:
        ConfigError: a key changed that must not change during a run.
        CheckpointError: the state is of another shape, of another format, or no checkpoint is whole.
    """
    rank = dist.get_rank(group)
    candidates = _from_rank_0(list_committed(run_dir.checkpoints)[::-1] if rank == 0 else [], group)
    live = get_live_state(model, optimizer) if candidates else {}
    for checkpoint in candidates:
        found = _from_rank_0(_inspect(checkpoint, config, live) if rank == 0 else None, group)
        if isinstance(found, SolventError):
            raise found
        if isinstance(found, Manifest):
            found = _load(checkpoint, found, live, device=device, group=group) or found
        if isinstance(found, Manifest):
            return Restored(progress=found.progress, extra=found.extra, path=checkpoint.path)
        if rank == 0:
            logger.warning("%s is damaged (%s); falling back to the one before", checkpoint.path, found)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} committed checkpoints in {run_dir.checkpoints} is whole, so resuming would "
            "silently train from scratch. Bring back their files from a copy, or start another run with run=<new name>."
        )
    return None


def _inspect(
    checkpoint: CommittedCheckpoint, config: RunConfig, live: Mapping[str, Tensor]
) -> Manifest | SolventError | str:
    """Return the manifest of a checkpoint to load, why the run cannot go on from it, or what is damaged."""
    try:
        manifest = read_manifest(checkpoint)
        changed = check_config(config, manifest)
        check_tensors({name: tuple(tensor.shape) for name, tensor in live.items()}, manifest)
    except SolventError as error:
        return error
    if changed:
        changes = ", ".join(f"{key}: {then} -> {now}" for key, (then, now) in sorted(changed.items()))
        logger.warning("resuming at step %d under a changed configuration: %s", manifest.progress.step, changes)
    return find_damage(checkpoint, manifest) or manifest


def _load(
    checkpoint: CommittedCheckpoint,
    manifest: Manifest,
    live: Mapping[str, Tensor],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> str | None:
    """Fill the live tensors; return what is damaged, the same on all ranks."""
    rng = {get_rng_name(device, dist.get_rank(group)): get_rng_state(device)}
    has_own_rng = manifest.world_size == dist.get_world_size(group) and manifest.device == device.type
    targets: dict[str, Any] = {**live, **(rng if has_own_rng else {})}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(targets, storage_reader=FileSystemReader(checkpoint.path), planner=planner, process_group=group)
    except CheckpointException as failure:
        return "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(failure.failures.items()))
    if has_own_rng:
        set_rng_state(device, *rng.values())
    return None


def _from_rank_0(value: Any, group: dist.ProcessGroup | None) -> Any:
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=group)
    return holder[0]
