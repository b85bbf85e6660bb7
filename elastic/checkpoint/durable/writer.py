"""Make a staged state durable: all ranks write their shards, then rank 0 commits. Runs on the thread of a save.

Nothing is decided by one rank alone: what fails on one fails on all.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import cast

import torch.distributed as dist

from elastic.checkpoint.durable import retention
from elastic.checkpoint.durable.shard_writer import Written, build_index, write_shard
from elastic.checkpoint.durable.storage_errors import explain
from elastic.checkpoint.exchange import Parcels, new_group
from elastic.checkpoint.format.manifest import CHECKPOINTS, BuildManifest, commit, get_directory
from elastic.checkpoint.staging.device_to_host import AbandonedError
from elastic.checkpoint.staging.write_plan import SavePlan
from elastic.errors import SolventError
from elastic.storage import Storage

logger = logging.getLogger(__name__)

_WRITTEN, _RESULT = Parcels[Written](Written), Parcels[float](float)
_SLOWEST_WRITE = 10
"""Ranks of one save may finish writing this many collective timeouts apart."""


class Fence:
    """Lets one thread at a time change the run's directory, and none after `shut` has returned.

    A thread that still waits for a peer of a dead world must never touch what the next world writes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_shut = False

    def shut(self) -> None:
        """Wait for the action under way, then refuse all others."""
        with self._lock:
            self._is_shut = True

    def check(self) -> None:
        """Raise AbandonedError once the fence is shut; for shards, whose names no other world uses."""
        if self._is_shut:
            raise AbandonedError

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_shut:
            self._lock.release()
            raise AbandonedError

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._lock.release()


class DurableWriter:
    """Writes and commits one save at a time, over a gloo group of its own (on the training group it hung).

    Args:
        generation: number of the attempt.
        keep_last: committed checkpoints that are kept.
        check_generation: called by rank 0 before it changes anything that other generations see; raises a SolventError
            if there is a newer one.
        before_commit: called by each rank once its shard is durable: what must not be older than the checkpoint (rows,
            samples) becomes durable here.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        generation: int,
        keep_last: int,
        timeout: timedelta,
        check_generation: Callable[[], None],
        before_commit: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._generation = generation
        self._keep_last = keep_last
        self._check_generation = check_generation
        self._before_commit = before_commit
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = new_group(_SLOWEST_WRITE * timeout)
        self._fence = Fence()

    def write(
        self, step: int, buffer: memoryview, plan: SavePlan, build_manifest: BuildManifest, *, start_s: float
    ) -> float:
        """Write and commit; return the seconds from `start_s` (monotonic) to the commit, as rank 0 measured them.

        Raises:
            AbandonedError: `close` was called.
            StorageError, SolventError: nothing was committed; on all ranks.
        """
        self._on_rank_0(partial(self._prepare, step))
        written = _WRITTEN.gather(self._write_own(get_directory(step), buffer, plan), self._group)
        save_s = self._on_rank_0(partial(self._commit, step, plan, build_manifest, written, start_s))
        if self._rank == 0:
            self._prune()
        return save_s

    def close(self) -> None:
        """Let nothing of this world reach the storage any more. Works with dead peers."""
        self._fence.shut()
        dist.destroy_process_group(self._group)

    def _write_own(self, directory: str, buffer: memoryview, plan: SavePlan) -> Written | Exception:
        try:
            key = f"{directory}/{plan.own_file}"
            written = write_shard(self._storage, key, buffer, plan.own, check=self._fence.check)
            self._before_commit()
        except (OSError, SolventError) as error:
            return error
        return written

    def _prepare(self, step: int) -> float:
        """Make room for a save; return when that was done."""
        self._check_generation()
        retention.remove_orphans(self._storage, generation=self._generation)
        retention.discard(
            self._storage, step
        )  # committed, but damaged: training went back before it and came here again
        return time.monotonic()

    def _commit(
        self,
        step: int,
        plan: SavePlan,
        build_manifest: BuildManifest,
        written: Sequence[Written | Exception],
        start_s: float,
    ) -> float:
        self._check_generation()  # before anything is removed, too: a newer world may have saved the same step
        failure = next((outcome for outcome in written if isinstance(outcome, Exception)), None)
        if failure is not None:
            self._clear(step)  # all ranks have stopped writing, and what they wrote may fill the disk
            raise failure
        done = cast(Sequence[Written], written)
        files = list(plan.layouts)
        index = build_index(
            plan.spreads,
            plan.layouts,
            {file: of_rank.crc32 for file, of_rank in zip(files, done, strict=True)},
        )
        records = {file: of_rank.record for file, of_rank in zip(files, done, strict=True)}
        commit(self._storage, get_directory(step), build_manifest(index, records))
        return time.monotonic() - start_s

    def _clear(self, step: int) -> None:
        try:
            retention.discard(self._storage, step)
        except OSError as error:
            logger.warning("a save that was cut short stays in %s: %s", self._storage.url, error)

    def _prune(self) -> None:
        try:
            with self._fence:
                retention.prune(self._storage, self._keep_last)
        except OSError as error:
            logger.warning("old checkpoints stay in %s/%s: %s", self._storage.url, CHECKPOINTS, error)

    def _on_rank_0(self, action: Callable[[], float]) -> float:
        """Act on rank 0; give the result, or the storage's error, to all ranks."""
        outcome: float | Exception | None = None
        if self._rank == 0:
            try:
                with self._fence:
                    outcome = action()
            except (OSError, SolventError) as error:
                outcome = error
        outcome = _RESULT.broadcast(outcome, self._group)
        if isinstance(outcome, OSError):
            raise explain(outcome, f"{self._storage.url}/{CHECKPOINTS}") from outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
