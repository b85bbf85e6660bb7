"""Save the state of all ranks in the background: to the memory of the nodes often, to the storage now and then.

The training thread only starts the copy to host memory; threads and the node's keeper do the rest. Nothing is decided
by one rank alone: what fails on one fails on all, at the same step.
"""

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from functools import partial
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.checkpoint.disk_tier import DiskTier
from elastic.checkpoint.durable import BuildManifest, DurableWriter
from elastic.checkpoint.fit import get_computing_config, get_config_hash
from elastic.checkpoint.flight import Flight, Tier
from elastic.checkpoint.holdings import Snapshot
from elastic.checkpoint.interval import SaveCost
from elastic.checkpoint.layout import FileRecord, Manifest, TensorRecord
from elastic.checkpoint.memory import Memory
from elastic.checkpoint.pace import Pace
from elastic.checkpoint.plan import SavePlan, build_plan
from elastic.checkpoint.stage import HostArenas, Stager
from elastic.checkpoint.state import get_live_state, get_mesh_shape, get_rng_name, get_rng_state
from elastic.checkpoint.votes import Votes
from elastic.config import RunConfig
from elastic.errors import SavesFailedError, StaleEpochError, StorageError
from elastic.ports import Address, DataIdentity, Progress
from elastic.rundir import format_utc
from elastic.storage import Storage

logger = logging.getLogger(__name__)

_TIERS: tuple[Tier, ...] = ("memory", "storage")
_LONGEST_PAUSE_S = 30.0
_FIRST_COST = SaveCost(stall_s=1.0, busy_s=1.0)
"""What a durable save is taken to cost until one was measured."""
_RECENT_STEPS = 20


class Checkpointer:
    """Saves one run from one rank of one world: one save to the storage at a time, and one to memory beside it.

    All methods but `wait_staged` and `close` are called by all ranks at the same step. Create it once the default
    process group exists; `close` it before that group goes.

    Args:
        storage: the run's.
        device: where the state lies.
        epoch: number of the attempt; names this world's files.
        start: where this world begins.
        check_epoch, before_commit: see `DurableWriter`.
        on_committed: called by rank 0, on the training thread, for each checkpoint that became visible.
        on_kept: likewise for each state that is in memory, and copied, on all ranks.
        memory: where snapshots are kept; None: states go to the storage only.
        peer: the keeper that shall have copies of this node's snapshots.
        restored_index: of this process' arena that holds the state that was restored; it is filled again last.
        mean_s_between_losses: what planned intervals are made for.
        data: what the state is trained on; every manifest says it.
    """

    def __init__(
        self,
        storage: Storage,
        config: RunConfig,
        *,
        device: torch.device,
        epoch: int,
        start: Progress = Progress(),  # noqa: B008 (frozen)
        check_epoch: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
        on_committed: Callable[[Progress], None] = lambda _: None,
        on_kept: Callable[[Progress], None] = lambda _: None,
        memory: Memory | None = None,
        peer: Address | None = None,
        restored_index: int | None = None,
        mean_s_between_losses: float = 3600.0,
        data: DataIdentity | None = None,
    ) -> None:
        self._config, self._data = config, data
        self._device = device
        self._epoch = epoch
        self._on_committed, self._on_kept = on_committed, on_kept
        self._memory, self._peer = memory, peer
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=config.fault.collective_timeout_s)
        self._votes = Votes(timeout)
        self._writer = DurableWriter(
            storage,
            epoch=epoch,
            keep_last=config.checkpoint.keep_last,
            timeout=timeout,
            check_epoch=check_epoch,
            before_commit=before_commit,
        )
        has_disk = bool(config.checkpoint.node_disk)
        self._disk = DiskTier(memory, every_s=config.checkpoint.node_disk_every_s) if memory and has_disk else None
        self._arenas = memory.get_arenas(device) if memory else HostArenas(device, count=1)
        self._stager = Stager(self._arenas)
        paced = partial(
            Pace,
            start_step=start.step,
            mean_s_between_losses=mean_s_between_losses,
            longest_s=config.checkpoint.longest_s,
        )
        self._paces: dict[Tier, Pace] = {
            "memory": paced(
                every_steps=config.checkpoint.memory_every_steps,
                at_first=True,
                first_cost=SaveCost(stall_s=0, busy_s=0),
            ),
            "storage": paced(every_steps=config.checkpoint.every_steps, at_first=False, first_cost=_FIRST_COST),
        }
        self._live: dict[str, Tensor] = {}
        self._live_moments: list[Any] = []
        self._plan: Future[SavePlan] | None = None
        self._saves: dict[Tier, Flight] = {}
        self._newest_index = restored_index
        self._has_plans = memory is None and config.checkpoint.every_steps > 0
        """The ranks have agreed on intervals, or need none."""
        self._voted_on: frozenset[Tier] = frozenset()
        """The saves that the open vote is about."""
        self._leaving: Tier | None = None
        """The save that may still be on the device of some rank: there is no room for another one beside it."""
        self._late: Tier | None = None
        """The save that waits for that."""
        self._save_s: list[float] = []
        self._kept_s: list[float] = []
        self._step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._called_s: float | None = None
        self._num_failed = 0
        """Saves to the storage in a row; the same on all ranks."""
        self._committed: Progress | None = None
        self._kept: Progress | None = None
        self._problem = ""

    def plan_ahead(self, live: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Get ready for the first save beside the first steps, if the state is all there: it was restored.

        Args:
            live: from `get_live_state`.
        """
        self._live, self._live_moments = dict(live), _list_moments(optimizer)
        self._plan = self._start_plan()

    def get_usual_s(self, tier: Tier) -> float | None:
        """Return the median seconds until a state was safe in a tier; None before the first.

        For the storage all ranks answer the same.
        """
        took_s = self._save_s if tier == "storage" or self._memory is None else self._kept_s
        return statistics.median(took_s) if took_s else None

    @property
    def is_keeping(self) -> bool:
        """Tell whether a snapshot is on its way to memory, copies included; the same on all ranks."""
        return "memory" in self._saves

    def get_due(self, step: int) -> Tier | None:
        """Return where the state after this step shall go, if anywhere; the same on all ranks."""
        if self._late:
            return self._late
        if self._paces["storage"].is_due(step):
            return "storage"
        return "memory" if self._memory and self._paces["memory"].is_due(step) else None

    def start_save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        progress: Progress,
        extra: Mapping[str, object],
        tier: Tier = "storage",
        copies: bool = True,
    ) -> bool:
        """Start to save the state as it is now, unless the last save of its kind is still under way.

        One that is due while the storage still takes the last one goes to memory only. One that is due while another is
        on its way off the device is due again after the next step. The state must not change before `wait_staged`.

        Args:
            extra: JSON values that `restore` gives back; rank 0's count.
            copies: whether what is kept in memory is copied to the peer; without, it is not safe from a loss.

        Returns:
            Whether a save was started: the same on all ranks.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        assert progress.step > 0, "there is nothing to save before the first step"
        self.poll()
        if tier == "storage" and "storage" in self._saves and self._memory:
            tier = "memory"  # the storage is slower than the rhythm; memory is not
        if tier in self._saves:
            return False
        self._late = tier if self._leaving else None
        if self._late:
            return False
        start_s = time.monotonic()
        state = self._get_state(model, optimizer)
        plan = self._get_plan()
        index = self._choose_arena()
        if index is None:
            return False
        if self._memory:
            self._memory.begin(index, epoch=self._epoch)
        live = {**state, get_rng_name(self._device, self._rank): get_rng_state(self._device)}
        save = Flight(
            tier=tier,
            progress=progress,
            start_s=start_s,
            staged=self._stager.stage(live, plan.own, plan.held, index=index),
            peer=self._peer if copies else None,
            plan=plan,
            build_manifest=self._describe(state, progress, extra),
        )
        save.stall_s = time.monotonic() - start_s
        self._saves[tier], self._newest_index = save, index
        self._leaving = tier if self._device.type == "cuda" else None
        for kind in ("memory", "storage") if tier == "storage" else ("memory",):
            self._paces[kind].started(progress.step)
        # a daemon: a thread that waits for a frozen peer must not keep the process from leaving
        bring = partial(save.bring, self._writer, self._keep if self._memory else None)
        threading.Thread(target=bring, name=f"save-{tier}", daemon=True).start()
        return True

    def wait_staged(self) -> None:
        """Let no later change of the state reach the saves in flight; call it right before `optimizer.step`."""
        for save in self._saves.values():
            save.staged.wait_on_device()

    def poll(self) -> Progress | None:
        """Return the newest progress that this checkpointer committed; call it (or `start_save`) once a step.

        The ranks vote on what is done. A poll counts the vote that the poll before it opened, so that the answer is
        there without waiting.

        Raises:
            SavesFailedError: too many saves in a row have failed; older checkpoints are unharmed.
            StaleEpochError, CheckpointError: the save in flight failed, and the next one would.
        """
        now_s = time.monotonic()
        if self._called_s is not None:
            self._step_s.append(now_s - self._called_s)
        self._called_s = now_s
        self._count_vote()
        is_storing = self._disk is not None and self._disk.index is not None
        if self._saves or is_storing or not self._has_plans:
            self._open_vote()
        return self._committed

    def finish(self, tier: Tier = "storage") -> Progress | None:
        """Wait until nothing of a kind is in flight and return the newest progress committed.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        self._count_vote()
        if save := self._saves.get(tier):
            if tier == "storage":
                self._settle(save)
            else:
                self._settle_kept(save, is_kept=bool(self._votes.agree(not save.kept.result())))
        return self._committed

    def save_now(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Save the state as it is now, and return whether it is committed: the same on all ranks.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self.finish() != progress:
            self.finish("memory")
            self.start_save(model, optimizer, progress=progress, extra=extra)
            self.finish()
        return self._committed == progress

    def hand_over(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        progress: Progress,
        extra: Mapping[str, object],
        copies: bool,
    ) -> bool:
        """Put the state as it is now where the next world finds it soonest, and return whether it is there.

        That is the memory of the nodes; the storage, if that does not work on some rank.

        Args:
            copies: whether it must outlive this node. Without, a loss before the next world has its own first snapshot
                falls back on what is older: in this world's memories until all have loaded, then in the storage.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self._memory:
            self.finish("memory")
            if self._kept != progress:
                self._wait_left()
                self.start_save(model, optimizer, progress=progress, extra=extra, tier="memory", copies=copies)
                self.finish("memory")
            if self._kept == progress:
                return True
        return self.save_now(model, optimizer, progress=progress, extra=extra)

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
        self._writer.close()
        if self._plan is not None:
            wait([self._plan])  # the next world plans with the same arenas
        for save in self._saves.values():
            save.staged.give_up()  # the next world fills the arenas anew
        self._saves.clear()
        self._votes.close()

    # ---- the votes

    def _open_vote(self) -> None:
        """Ask all ranks what is done, and after how many steps they would save again."""
        kept = [save.kept for save in self._saves.values() if save.tier == "memory"]
        committed = [save.committed_s for save in self._saves.values() if save.tier == "storage"]
        step_s = max(statistics.median(self._step_s), 1e-4) if self._step_s else 1.0
        self._voted_on = frozenset(self._saves)
        self._votes.open(
            [
                all(future.done() for future in kept),
                all(future.done() and not future.result() for future in kept),
                all(future.done() for future in committed),
                all(save.staged.has_left for save in self._saves.values()),
                *(self._disk.get_ballot() if self._disk else (True, True, False)),
                *(-self._paces[tier].plan(step_s) for tier in _TIERS),  # the longest counts
            ]
        )

    def _count_vote(self) -> None:
        outcome = self._votes.count()
        if outcome is None:
            return
        is_over, is_kept, is_written, has_left, is_stored, is_stored_well, is_disk_due, *plans = outcome
        if self._disk:
            self._disk.count(is_over=bool(is_stored), is_well=bool(is_stored_well), is_due=bool(is_disk_due))
        self._has_plans = True
        if has_left and self._leaving in self._voted_on:
            self._leaving = None
        for tier, negative_steps in zip(_TIERS, plans, strict=True):
            self._paces[tier].agree(int(-negative_steps))
        if is_over and "memory" in self._voted_on:
            self._settle_kept(self._saves["memory"], is_kept=bool(is_kept))
        if is_written and "storage" in self._voted_on:
            self._settle(self._saves["storage"])

    def _wait_left(self) -> None:
        """Return once no save is on the device of any rank."""
        self._count_vote()
        if self._leaving:
            self._saves[self._leaving].staged.wait_left()
            self._votes.agree(1)
            self._leaving = None

    def _forget(self, tier: Tier) -> None:
        """Take a save that is over, on all ranks, out of the books."""
        del self._saves[tier]
        if self._leaving == tier:
            self._leaving = None

    def _settle_kept(self, save: Flight, *, is_kept: bool) -> None:
        """Take the end of a snapshot."""
        self._forget("memory")
        self._paces["memory"].measured(SaveCost(stall_s=save.stall_s, busy_s=save.kept_s))
        if is_kept:
            self._take_kept(save)
            return
        problem = save.kept.result()
        if problem and problem != self._problem:
            self._problem = problem
            logger.warning("step %d is not safe in memory, training goes on: %s", save.progress.step, problem)

    def _take_kept(self, save: Flight) -> None:
        assert self._memory is not None
        is_first, self._kept = self._kept is None, save.progress
        if save.peer != self._peer:  # handed over: what is older may be needed yet
            return
        if is_first:  # from now on nothing falls back on what earlier attempts have left
            self._memory.retire(before_epoch=self._epoch, keep_step=None)
            self._arenas.release_outgrown()
        self._kept_s.append(save.kept_s)
        if self._disk and self._disk.is_due:
            self._disk.start(save.staged.index, self._get_snapshot(save))
        if self._rank == 0:
            self._on_kept(save.progress)

    def _settle(self, save: Flight) -> None:
        self._forget("storage")
        try:
            self._save_s.append(save.committed_s.result())
        except StaleEpochError:
            raise
        except StorageError as error:
            self._go_on_without(save, error)
            return
        self._paces["storage"].measured(SaveCost(stall_s=save.stall_s, busy_s=self._save_s[-1]))
        self._num_failed = 0
        self._committed = save.progress
        if self._rank == 0:
            self._on_committed(save.progress)

    def _go_on_without(self, save: Flight, error: StorageError) -> None:
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

    # ---- one save

    def _choose_arena(self) -> int | None:
        """Return the arena for the next save; None, on all ranks, if it must wait.

        One that is being written, or copied, is in use. Of two that are free the older is filled: while that is under
        way, the newer one is the state to fall back on.
        """
        in_use = {save.staged.index for save in self._saves.values()} | {self._disk.index if self._disk else None}
        free = [index for index in self._arenas.indices if index not in in_use]
        return next((index for index in free if index != self._newest_index), free[0] if free else None)

    def _keep(self, save: Flight) -> Future[str]:
        assert self._memory is not None
        manifest = save.build_manifest(save.plan.get_shapes(), {})
        return self._memory.fill(save.staged.index, self._get_snapshot(save), save.plan, manifest, peer=save.peer)

    def _get_snapshot(self, save: Flight) -> Snapshot:
        return Snapshot(epoch=self._epoch, step=save.progress.step, world_size=self._world_size, rank=self._rank)

    def _describe(self, state: Mapping[str, Tensor], progress: Progress, extra: Mapping[str, object]) -> BuildManifest:
        manifest = Manifest(
            progress=progress,
            epoch=self._epoch,
            world_size=self._world_size,
            device=self._device.type,
            mesh=get_mesh_shape(state, self._world_size),
            config=(computing := get_computing_config(self._config, self._data)),
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

    def _get_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the live tensors; collecting them takes percents of a step, and updates leave them where they are."""
        if not self._live or not all(map(is_, _list_moments(optimizer), self._live_moments)):
            self._live, self._plan = get_live_state(model, optimizer), None
            self._live_moments = _list_moments(optimizer)
        return self._live

    def _get_plan(self) -> SavePlan:
        if self._plan is None:
            self._plan = self._start_plan()
        return self._plan.result()

    def _start_plan(self) -> Future[SavePlan]:
        planner = ThreadPoolExecutor(1, "plan")
        plan = planner.submit(self._make_plan)
        planner.shutdown(wait=False)
        return plan

    def _make_plan(self) -> SavePlan:
        """Cut the live state into shards, and make room for this rank's."""
        plan = build_plan(
            self._live, device=self._device, epoch=self._epoch, rank=self._rank, world_size=self._world_size
        )
        self._arenas.make_room(plan.own.num_bytes)
        return plan


def _list_moments(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for values in optimizer.state.values() for value in values.values()]
