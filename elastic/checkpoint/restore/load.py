"""Restore a run from the newest state there is, over any number of ranks and any strategy.

That is a snapshot in the memories of the living nodes, or a committed checkpoint in the storage. Each rank reads the
bytes that its own part of the state needs, and no others, through a few small buffers: no rank ever holds more of the
state on the host than these. Every block is verified before it reaches the live tensors. A damaged block ends the
attempt on all ranks; the older state that is tried next overwrites all of the state, and if none is whole the run ends:
half a state is never trained on.
"""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.checkpoint.durable.storage_errors import explain_unreadable
from elastic.checkpoint.exchange import Parcels
from elastic.checkpoint.format.compat import get_unsaved
from elastic.checkpoint.format.manifest import CommittedCheckpoint, Manifest
from elastic.checkpoint.format.read_plan import plan_checks, plan_reads
from elastic.checkpoint.format.sharding import get_box
from elastic.checkpoint.format.sources import ShardSource, StorageSource
from elastic.checkpoint.replicas.discovery import WholeSnapshot
from elastic.checkpoint.restore.candidates import (
    Candidate,
    describe_candidate,
    find_candidates,
    get_source,
    inspect_candidate,
    outline_candidate,
)
from elastic.checkpoint.restore.device_exchange import fill_from_devices
from elastic.checkpoint.restore.fill_tensors import NUM_COPIERS, NUM_READERS, READ_BYTES, fill, flatten
from elastic.checkpoint.staging.device_cache import Rows
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import (
    DTYPES,
    get_live_state,
    get_local,
    get_rng_name,
    get_spread,
    set_rng_state,
)
from elastic.config import RunConfig
from elastic.errors import CheckpointError
from elastic.ports import Address, DataIdentity, Progress, Source
from elastic.stopwatch import Stopwatch
from elastic.storage import Storage

logger = logging.getLogger(__name__)

_CANDIDATES = Parcels[Sequence[Candidate]](Sequence[Candidate])
_FOUND = Parcels[Manifest | str](Manifest | str)
_DAMAGE = Parcels[str | None](str | None)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was restored beside the state itself; `extra` is what the caller gave when it was saved."""

    progress: Progress
    extra: Mapping[str, Any]
    generation: int
    """Number of the attempt that saved it."""
    source: Source
    live: Mapping[str, Tensor] = field(repr=False)
    """The tensors that were written to."""


def restore(
    storage: Storage,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: RunConfig,
    device: torch.device,
    data: DataIdentity | None = None,
    memory: Memory | None = None,
    replica_servers: Mapping[str, Address] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Restored | None:
    """Write the newest state into model and optimizer, in place; None when there is none.

    Rank 0 chooses and all ranks load the same. What is damaged is passed over with a warning. The learning rate and
    other hyperparameters of the optimizer stay what the configuration made them.

    Args:
        device: where the state lies.
        data: what training would go on with.
        memory: this process' part of the memory tier.
        replica_servers: where the memories of the living nodes are served.
        group: all ranks, unused by anyone else meanwhile; the default group if None.

    Raises:
        ConfigError: a key changed that must not change during a run.
        DataError: the data is not what the run was trained on.
        CheckpointError: the state is of another shape, of another format, or no checkpoint is whole.
        StorageError: the storage cannot be read.
    """
    rank, stopwatch = dist.get_rank(group), Stopwatch()
    expected_step = _get_expected_step(memory, device, group) if memory else 0
    replicas = memory.fetch_all(replica_servers or {}, expected_step=expected_step) if memory and rank == 0 else []
    seen = find_candidates(storage, replicas) if rank == 0 else None
    candidates = _CANDIDATES.broadcast(list(map(outline_candidate, seen)) if isinstance(seen, list) else seen, group)
    if isinstance(candidates, Exception):
        raise candidates
    stopwatch.lap("looked")
    live = get_live_state(model, optimizer) if candidates else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    stopwatch.lap("live state")
    for number, candidate in enumerate(candidates):
        whole = seen[number] if isinstance(seen, list) else None
        found = _FOUND.broadcast(inspect_candidate(storage, whole, config, data, shapes) if whole else None, group)
        if isinstance(found, Exception):
            raise found
        if isinstance(found, Manifest):
            stopwatch.lap("manifest")
            with _open_sources(storage, candidate, memory, replica_servers or {}) as sources:
                damage = load_state(
                    *(live, found, sources),
                    device=device,
                    group=group,
                    rows=memory.find_resident(candidate) if memory and isinstance(candidate, WholeSnapshot) else (),
                    num_readers=NUM_COPIERS if isinstance(candidate, WholeSnapshot) else NUM_READERS,
                )
                found = damage or found
            stopwatch.lap("read")
        if isinstance(found, Manifest):
            source = get_source(candidate, storage)
            logger.info("step %d restored: %s", found.progress.step, stopwatch)
            return Restored(
                progress=found.progress, extra=found.extra, generation=found.generation, source=source, live=live
            )
        if rank == 0:
            logger.warning(
                "%s is damaged (%s); falling back to the one before", describe_candidate(candidate, storage), found
            )
    if any(isinstance(candidate, CommittedCheckpoint) for candidate in candidates):
        raise CheckpointError(
            f"none of the {len(candidates)} committed checkpoints in {storage.url} is whole, so resuming would "
            "silently train from scratch. Bring back their files from a copy, or start another run with run=<new name>."
        )
    return None


def _get_expected_step(memory: Memory, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """Return the newest step that any rank has seen handed over: rank 0 may be new, and must not miss it."""
    expected = torch.tensor(memory.expected_step, device=device)
    memory.expected_step = 0
    if dist.get_world_size(group) > 1:
        dist.all_reduce(expected, dist.ReduceOp.MAX, group)
    return int(expected)


@contextmanager
def _open_sources(
    storage: Storage, candidate: Candidate, memory: Memory | None, replica_servers: Mapping[str, Address]
) -> Generator[Sequence[ShardSource]]:
    if isinstance(candidate, CommittedCheckpoint):
        yield [StorageSource(storage, candidate.directory)]
    else:
        assert memory is not None, "a process that lists snapshots can read them"
        with memory.open_sources(candidate, replica_servers) as sources:
            yield sources


def load_state(
    live: Mapping[str, Tensor],
    manifest: Manifest,
    sources: Sequence[ShardSource],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
    rows: Sequence[Rows] = (),
    num_readers: int = NUM_READERS,
) -> str | None:
    """Fill the live tensors; return what is damaged, the same on all ranks.

    Args:
        sources: where shards may be read, the best first.
        rows: what this rank has on its device.

    Raises:
        StorageError: the storage cannot be read; on all ranks.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    unsaved = get_unsaved(live, manifest)
    spreads = {name: get_spread(tensor, world_size=world_size) for name, tensor in live.items() if name not in unsaved}
    wanted = {name: get_box(spread, rank) for name, spread in spreads.items()}
    targets = {name: get_local(tensor) for name, tensor in live.items()}
    records = dict(manifest.tensors)
    others = dict(manifest.generators)
    own_rng = get_rng_name(device, rank)
    has_own_rng = (
        manifest.world_size == world_size and manifest.device == device.type and own_rng in manifest.generators
    )
    if has_own_rng:
        record = records[own_rng] = manifest.generators[own_rng]
        targets[own_rng] = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        wanted[own_rng] = record.chunks[0].box
        others = {}  # every rank reads its own
    reads, gaps = plan_reads(records, wanted, max_bytes=READ_BYTES)
    # what no rank needs is verified as well, so that damage is found now and not when it is needed
    files = {name: record for i, (name, record) in enumerate(manifest.files.items()) if i % world_size == rank}
    reads += plan_checks(others if rank == 0 else {}, files, max_bytes=READ_BYTES)
    try:
        damage = f"{', '.join(gaps)}: a part is in no file" if gaps else None
        flat = flatten(targets)
        if device.type == "cuda":
            reads = fill_from_devices(reads, flat, rows, device=device, group=group)
            torch.cuda.current_stream(device).synchronize()
        damage = damage or fill(flat, reads, sources, device=device, num_readers=num_readers)
    except OSError as error:
        damage = explain_unreadable(error, sources[-1].name)
    outcomes = _DAMAGE.all_gather(damage, group)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    for name in unsaved:
        targets[name].detach().zero_()
    found = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome]
    if not found and has_own_rng:
        set_rng_state(device, targets[own_rng])
    return "; ".join(found) or None
