"""Save the state of all ranks in the background, and commit it once all of it is durable.

The training thread only starts the copy to host memory; one thread per rank does the rest, over a gloo group of its
own (on the training group it hung). Nothing is decided by one rank alone: what fails on one fails on all, at the
same step.
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.checkpoint import keep
from elastic.checkpoint.fit import get_computing_config, get_config_hash
from elastic.checkpoint.layout import (
    CHECKPOINTS,
    FileRecord,
    Manifest,
    TensorRecord,
    commit,
    get_directory,
    get_shard_name,
)
from elastic.checkpoint.shards import Box, ShardLayout, Spread, build_layout, get_box, plan_chunks
from elastic.checkpoint.stage import Allocate, Staged, Stager
from elastic.checkpoint.state import get_live_state, get_mesh_shape, get_rng_name, get_rng_state, get_spread
from elastic.checkpoint.storage import explain
from elastic.checkpoint.write import Written, build_index, write_shard
from elastic.config import RunConfig
from elastic.errors import SavesFailedError, SolventError, StaleEpochError, StorageError
from elastic.ports import Progress
from elastic.rundir import format_utc
from elastic.storage import Storage

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LONGEST_PAUSE_S = 30.0
_SLOWEST_WRITE = 10
"""Ranks of one save may finish writing this many collective timeouts apart."""


class AbandonedError(Exception):
    """The save was given up; nothing more of it may become visible."""


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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Who writes what; the same on all ranks, and the same for every save while the state has the same spreads."""

    spreads: Mapping[str, Spread]
    layouts: Mapping[str, ShardLayout]
    """Of each file, in the order of the ranks."""
    held: Mapping[str, Box]
    """What this rank holds, all of it or a part of which it writes."""


@dataclass(frozen=True, kw_only=True)
class _Save:
    progress: Progress
    start_s: float
    staged: Staged
    plan: _Plan
    manifest: Callable[[Mapping[str, TensorRecord], Mapping[str, FileRecord]], Manifest]
    committed_s: Future[float]
    """Seconds from start to commit, as rank 0 measured them; or why there was no commit."""


class Checkpointer:
    """Saves one run from one rank of one world, one save at a time.

    All methods but `wait_staged` and `close` are called by all ranks at the same step. Create it once the default
    process group exists; `close` it before that group goes.

    Args:
        storage: the run's.
        device: where the state lies.
        epoch: number of the attempt; names this world's files.
        check_epoch: called by rank 0 before it changes anything that other epochs see; raises a SolventError if a newer
            epoch exists.
        before_commit: called by each rank, on the writing thread, once its shard is durable: what must not be older
            than the checkpoint (rows, samples) becomes durable here.
        on_committed: called by rank 0, on the training thread, for each checkpoint that became visible.
        allocate: gives the host memory that shards are staged in.
    """

    def __init__(
        self,
        storage: Storage,
        config: RunConfig,
        *,
        device: torch.device,
        epoch: int,
        check_epoch: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
        on_committed: Callable[[Progress], None] = lambda _: None,
        allocate: Allocate | None = None,
    ) -> None:
        self._storage = storage
        self._config = config
        self._device = device
        self._epoch = epoch
        self._check_epoch = check_epoch
        self._before_commit = before_commit
        self._on_committed = on_committed
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=config.fault.collective_timeout_s)
        self._votes = _new_group(timeout)
        self._writers = _new_group(_SLOWEST_WRITE * timeout)
        self._stager = Stager(device, allocate=allocate)
        self._plan: _Plan | None = None
        self._planned: dict[str, Spread] = {}
        self._fence = Fence()
        self._save: _Save | None = None
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        self._save_s: list[float] = []
        self._num_failed = 0
        """Saves in a row; the same on all ranks."""
        self._committed: Progress | None = None

    @property
    def usual_save_s(self) -> float | None:
        """Median seconds from `start_save` to commit, the same on all ranks; None before the first."""
        return statistics.median(self._save_s) if self._save_s else None

    def start_save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        progress: Progress,
        extra: Mapping[str, object],
    ) -> bool:
        """Start to save the state as it is now, unless the last save is still under way.

        The state must not change before `wait_staged`.

        Args:
            extra: JSON values that `restore` gives back; rank 0's count.

        Returns:
            Whether a save was started: the same on all ranks.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        assert progress.step > 0, "there is nothing to save before the first step"
        self.poll()
        if self._save is not None:
            return False
        state = get_live_state(model, optimizer)
        plan = self._get_plan(state)
        manifest = partial(
            Manifest,
            progress=progress,
            epoch=self._epoch,
            world_size=self._world_size,
            device=self._device.type,
            mesh=get_mesh_shape(state, self._world_size),
            config=(computing := get_computing_config(self._config)),
            config_hash=get_config_hash(computing),
            extra=dict(extra),
        )
        own_rng = get_rng_name(self._device, self._rank)
        live = {**state, own_rng: get_rng_state(self._device)}
        self._save = _Save(
            progress=progress,
            start_s=time.monotonic(),
            staged=self._stager.stage(live, plan.layouts[self._get_shard_name(self._rank)], plan.held),
            plan=plan,
            manifest=lambda index, files: manifest(
                tensors={name: record for name, record in index.items() if name in state},
                generators={name: record for name, record in index.items() if name not in state},
                files=files,
                saved_utc=format_utc(time.time()),
            ),
            committed_s=Future(),
        )
        # a daemon: a thread that waits for a frozen peer must not keep the process from leaving
        threading.Thread(target=self._run, args=(self._save,), name="checkpoint", daemon=True).start()
        return True

    def wait_staged(self) -> None:
        """Let no later change of the state reach the save in flight; call it right before `optimizer.step`."""
        if self._save is not None:
            self._save.staged.wait_on_device()

    def poll(self) -> Progress | None:
        """Return the newest progress that this checkpointer committed; call it once a step.

        The ranks vote on whether all are done. A poll counts the vote that the poll before it opened, so that the
        answer is there without waiting.

        Raises:
            SavesFailedError: too many saves in a row have failed; older checkpoints are unharmed.
            StaleEpochError, CheckpointError: the save in flight failed, and the next one would.
        """
        if self._save is not None:
            if self._count_vote():
                self._settle(self._save)
            else:
                is_done = torch.tensor([self._save.committed_s.done()], dtype=torch.int32)
                work = dist.all_reduce(is_done, dist.ReduceOp.MIN, self._votes, async_op=True)
                self._vote = is_done, cast(dist.Work, work)
        return self._committed

    def finish(self) -> Progress | None:
        """Wait until nothing is in flight and return the newest progress committed.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self._save is not None:
            self._count_vote()
            self._settle(self._save)
        return self._committed

    def save_now(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Save the state as it is now, and return whether it is committed: the same on all ranks.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self.finish() != progress:
            self.start_save(model, optimizer, progress=progress, extra=extra)
            self.finish()
        return self._committed == progress

    def save_last(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Return when the state as it is now is committed; try again if a save fails, after longer and longer pauses.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        while not self.save_now(model, optimizer, progress=progress, extra=extra):
            time.sleep(min(2.0**self._num_failed, _LONGEST_PAUSE_S))
        return True

    def close(self) -> None:
        """Give up what is in flight; after this nothing of this world reaches the storage. Works with dead peers."""
        self._fence.shut()
        self._save = self._vote = None
        for group in (self._votes, self._writers):
            dist.destroy_process_group(group)

    def _count_vote(self) -> bool:
        if self._vote is None:
            return False
        (is_done, work), self._vote = self._vote, None
        work.wait()
        return bool(is_done.item())

    def _settle(self, save: _Save) -> None:
        self._save = None
        try:
            self._save_s.append(save.committed_s.result())
        except StaleEpochError:
            raise
        except StorageError as error:
            self._go_on_without(save, error)
            return
        self._num_failed = 0
        self._committed = save.progress
        if self._rank == 0:
            self._on_committed(save.progress)

    def _go_on_without(self, save: _Save, error: StorageError) -> None:
        """Say that a save failed; a disk may be full for a while, but training for nothing must end."""
        self._num_failed += 1
        most = self._config.checkpoint.max_failed_saves
        if self._num_failed >= most:
            raise SavesFailedError(
                f"the last {most} saves failed (checkpoint.max_failed_saves={most}), so training on would only be "
                f"lost; the run ends at step {save.progress.step}, resumable from its newest checkpoint. {error}"
            ) from error
        if self._rank == 0:
            logger.warning(
                "the save of step %d failed, training goes on (%d in a row; the run ends after %d): %s",
                *(save.progress.step, self._num_failed, most, error),
            )

    def _run(self, save: _Save) -> None:
        try:
            save.committed_s.set_result(self._write(save))
        except BaseException as error:  # whatever it is, the training thread raises it
            save.committed_s.set_exception(error)

    def _get_shard_name(self, rank: int) -> str:
        return get_shard_name(epoch=self._epoch, rank=rank)

    def _get_plan(self, state: Mapping[str, Tensor]) -> _Plan:
        spreads = {name: get_spread(tensor, world_size=self._world_size) for name, tensor in state.items()}
        if spreads == self._planned:
            assert self._plan is not None
            return self._plan
        self._planned = dict(spreads)
        rng = get_spread(get_rng_state(self._device), world_size=1)
        for rank in range(self._world_size):
            spreads[get_rng_name(self._device, rank)] = replace(rng, ranks=(rank,))
        dtypes = {name: spread.dtype for name, spread in spreads.items()}
        chunks = plan_chunks(spreads, world_size=self._world_size)
        boxes = {name: get_box(spread, self._rank) for name, spread in spreads.items() if self._rank in spread.ranks}
        self._plan = _Plan(
            spreads=spreads,
            layouts={self._get_shard_name(rank): build_layout(of_rank, dtypes) for rank, of_rank in enumerate(chunks)},
            held={name: box for name, box in boxes.items() if box is not None},
        )
        return self._plan

    def _write(self, save: _Save) -> float:
        directory = get_directory(save.progress.step)
        save.staged.wait_on_host()
        self._on_rank_0(partial(self._prepare, save.progress.step))
        written = self._gather(self._write_own(directory, save.staged))
        save_s = self._on_rank_0(partial(self._commit, directory, save, written))
        if self._rank == 0:
            self._prune()
        return save_s

    def _write_own(self, directory: str, staged: Staged) -> Written | Exception:
        try:
            key = f"{directory}/{self._get_shard_name(self._rank)}"
            written = write_shard(self._storage, key, staged.arena, staged.layout, check=self._fence.check)
            self._before_commit()
        except (OSError, SolventError) as error:
            return error
        return written

    def _prepare(self, step: int) -> None:
        self._check_epoch()
        keep.remove_orphans(self._storage, epoch=self._epoch)
        keep.discard(self._storage, step)  # committed, but damaged: training went back before it and came here again

    def _clear(self, step: int) -> None:
        try:
            keep.discard(self._storage, step)
        except OSError as error:
            logger.warning("a save that was cut short stays in %s: %s", self._storage.url, error)

    def _commit(self, directory: str, save: _Save, written: Sequence[Written | Exception]) -> float:
        self._check_epoch()  # before anything is removed, too: a newer world may have saved the same step
        failure = next((outcome for outcome in written if isinstance(outcome, Exception)), None)
        if failure is not None:
            self._clear(save.progress.step)  # all ranks have stopped writing, and what they wrote may fill the disk
            raise failure
        done = cast(Sequence[Written], written)
        files = list(save.plan.layouts)
        index = build_index(
            save.plan.spreads,
            save.plan.layouts,
            {file: of_rank.crc32 for file, of_rank in zip(files, done, strict=True)},
        )
        records = {file: of_rank.record for file, of_rank in zip(files, done, strict=True)}
        commit(self._storage, directory, save.manifest(index, records))
        return time.monotonic() - save.start_s

    def _prune(self) -> None:
        try:
            with self._fence:
                keep.prune(self._storage, self._config.checkpoint.keep_last)
        except OSError as error:
            logger.warning("old checkpoints stay in %s/%s: %s", self._storage.url, CHECKPOINTS, error)

    def _gather(self, outcome: Written | Exception) -> list[Written | Exception]:
        """Return on rank 0 what became of the shards of all ranks."""
        of_ranks: list[Written | Exception] | None = [outcome] * self._world_size if self._rank == 0 else None
        dist.gather_object(outcome, of_ranks, dst=0, group=self._writers)
        return of_ranks or []

    def _on_rank_0(self, action: Callable[[], _T]) -> _T:
        """Act on rank 0; give the result, or the storage's error, to all ranks."""
        outcome: list[tuple[_T | None, Exception | None]] = [(None, None)]
        if self._rank == 0:
            try:
                with self._fence:
                    outcome = [(action(), None)]
            except (OSError, SolventError) as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, group=self._writers)
        result, failure = outcome[0]
        if isinstance(failure, OSError):
            raise explain(failure, f"{self._storage.url}/{CHECKPOINTS}") from failure
        if failure is not None:
            raise failure
        return cast(_T, result)


def _new_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank of the world is in it"
    return group
