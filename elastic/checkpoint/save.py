"""Save the state of all ranks in the background, and commit it once all of it is durable.

The training thread only starts the copy to host memory; one thread per rank does the rest, over a gloo group of its
own (on the training group it hung). Nothing is decided by one rank alone: what fails on one fails on all, at the
same step.
"""

import logging
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from elastic.checkpoint import keep
from elastic.checkpoint.fit import get_computing_config, get_config_hash
from elastic.checkpoint.layout import FileRecord, Manifest, commit, get_directory
from elastic.checkpoint.shards import Fence, write_shards
from elastic.checkpoint.stage import Staged, Stager
from elastic.checkpoint.state import get_live_state, get_mesh_shape, get_rng_name, get_rng_state
from elastic.checkpoint.storage import explain, sync_directory
from elastic.config import RunConfig
from elastic.errors import CheckpointError, StorageError
from elastic.ports import Progress
from elastic.rundir import RunDir

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_SLOWEST_WRITE = 10
"""Ranks of one save may finish writing this many collective timeouts apart."""


@dataclass(frozen=True, kw_only=True)
class _Save:
    progress: Progress
    start_s: float
    staged: Staged
    manifest: Callable[[Mapping[str, FileRecord]], Manifest]
    committed_s: Future[float]
    """Seconds from start to commit, as rank 0 measured them; or why there was no commit."""


class Checkpointer:
    """Saves one run from one rank of one world, one save at a time.

    All methods but `wait_staged` and `close` are called by all ranks at the same step. Create it once the default
    process group exists; `close` it before that group goes.

    Args:
        device: where the state lies.
        on_committed: called by rank 0, on the training thread, for each checkpoint that became visible.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: RunConfig,
        *,
        device: torch.device,
        on_committed: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._checkpoints = run_dir.checkpoints
        self._config = config
        self._device = device
        self._on_committed = on_committed
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=config.fault.collective_timeout_s)
        self._votes = _new_group(timeout)
        self._writers = _new_group(_SLOWEST_WRITE * timeout)
        self._stager = Stager(device)
        self._fence = Fence()
        self._save: _Save | None = None
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        self._save_s: list[float] = []
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
            StorageError, CheckpointError: the last save failed.
        """
        assert progress.step > 0, "there is nothing to save before the first step"
        self.poll()
        if self._save is not None:
            return False
        state = get_live_state(model, optimizer)
        manifest = partial(
            Manifest,
            progress=progress,
            world_size=self._world_size,
            device=self._device.type,
            mesh=get_mesh_shape(state, self._world_size),
            config=(computing := get_computing_config(self._config)),
            config_hash=get_config_hash(computing),
            tensors={name: tuple(tensor.shape) for name, tensor in state.items()},
            extra=dict(extra),
        )
        state[get_rng_name(self._device, self._rank)] = get_rng_state(self._device)
        self._save = _Save(
            progress=progress,
            start_s=time.monotonic(),
            staged=self._stager.stage(state),
            manifest=lambda files: manifest(files=files),
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
            StorageError, CheckpointError: the save in flight failed; older checkpoints are unharmed.
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
    ) -> None:
        """Return when the state as it is now is committed.

        Raises:
            StorageError, CheckpointError: it failed, or the save that was in flight did.
        """
        if self.finish() != progress:
            self.start_save(model, optimizer, progress=progress, extra=extra)
            self.finish()

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
        self._save_s.append(save.committed_s.result())
        self._committed = save.progress
        if self._rank == 0:
            self._on_committed(save.progress)

    def _run(self, save: _Save) -> None:
        try:
            save.committed_s.set_result(self._write(save))
        except BaseException as error:  # whatever it is, the training thread raises it
            save.committed_s.set_exception(error)

    def _write(self, save: _Save) -> float:
        directory = get_directory(self._checkpoints, save.progress.step)
        save.staged.wait_on_host()
        self._on_rank_0(partial(self._prepare, directory))
        try:
            files = write_shards(directory, save.staged, group=self._writers, fence=self._fence)
        except CheckpointException as failure:
            # all ranks have stopped writing; what they wrote may be what fills the disk
            self._on_rank_0(partial(shutil.rmtree, directory, ignore_errors=True))
            raise self._explain(failure, save.progress) from failure
        save_s = self._on_rank_0(partial(self._commit, directory, save, self._gather(files)))
        if self._rank == 0:
            self._prune()
        return save_s

    def _prepare(self, directory: Path) -> None:
        keep.remove_orphans(self._checkpoints)
        if directory.exists():  # committed, but damaged: training went back before it and has come here again
            keep.discard(directory)
        directory.mkdir(parents=True)
        sync_directory(directory.parent)

    def _commit(self, directory: Path, save: _Save, files: Mapping[str, FileRecord]) -> float:
        commit(directory, save.manifest(files))
        return time.monotonic() - save.start_s

    def _prune(self) -> None:
        try:
            with self._fence:
                keep.prune(self._checkpoints, self._config.checkpoint.keep_last)
        except OSError as error:
            logger.warning("old checkpoints stay in %s: %s", self._checkpoints, error)

    def _gather(self, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """Return the files of all ranks on rank 0, once all are durable."""
        of_ranks: list[dict[str, FileRecord]] | None = [{}] * self._world_size if self._rank == 0 else None
        dist.gather_object(files, of_ranks, dst=0, group=self._writers)
        return {name: record for of_rank in of_ranks or [] for name, record in of_rank.items()}

    def _on_rank_0(self, action: Callable[[], _T]) -> _T:
        """Act on rank 0; give the result, or the storage's error, to all ranks."""
        outcome: list[tuple[_T | None, OSError | None]] = [(None, None)]
        if self._rank == 0:
            try:
                with self._fence:
                    outcome = [(action(), None)]
            except OSError as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, group=self._writers)
        result, failure = outcome[0]
        if failure is not None:
            raise explain(failure, self._checkpoints) from failure
        return cast(_T, result)

    def _explain(self, failure: CheckpointException, progress: Progress) -> StorageError | CheckpointError:
        """Return the same error on all ranks: the storage's if there is one."""
        by_rank = {rank: error for rank, (error, _) in sorted(failure.failures.items())}
        for error in by_rank.values():
            if isinstance(error, OSError):
                return explain(error, self._checkpoints)
        return CheckpointError(
            f"the state of step {progress.step} could not be saved: {by_rank}. The ranks disagree about what to "
            "write, or torch cannot write it; older checkpoints are unharmed. Resume from them, and report this."
        )


def _new_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank of the world is in it"
    return group
