"""Save the state of all ranks in the background: to the memory of the nodes often, to the storage now and then.

The training thread only starts the copy to host memory; threads and the node's keeper do the rest. A state that is
whole in the memory of the nodes counts at once; its copies on other nodes trail behind (`PeerTier`). Nothing is decided
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
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.checkpoint.bandwidth import Rates
from elastic.checkpoint.consensus import Votes
from elastic.checkpoint.durable.writer import DurableWriter
from elastic.checkpoint.format.compat import get_computing_config, get_config_hash
from elastic.checkpoint.format.manifest import BuildManifest, FileRecord, Manifest, TensorRecord
from elastic.checkpoint.in_flight import Flight, Tier
from elastic.checkpoint.interval import SaveCost
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.schedule import Pace
from elastic.checkpoint.staging.buffer_choice import Urgency
from elastic.checkpoint.staging.host_buffers import HostArenas
from elastic.checkpoint.staging.stager import Stager
from elastic.checkpoint.staging.write_plan import SavePlan, build_plan
from elastic.checkpoint.tiers.disk import DiskTier
from elastic.checkpoint.tiers.memory import NO_BALLOT, MemoryTier, OnKept, ignore_kept
from elastic.checkpoint.tiers.peer import Kept
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import get_live_state, get_mesh_shape, get_rng_name, get_rng_state
from elastic.config import RunConfig
from elastic.errors import SavesFailedError, StaleEpochError, StorageError
from elastic.ports import Address, DataIdentity, Progress
from elastic.records.rundir import format_utc
from elastic.storage import Storage
from elastic.timeline import Laps

logger = logging.getLogger(__name__)


_TIERS: tuple[Tier, ...] = ("memory", "storage")
_LONGEST_PAUSE_S = 30.0
_LONGEST_UNKEPT_S = 3.0
"""A snapshot is begun so long after the last one at the latest, if that costs training next to nothing:"""
_MOST_SHARE = 0.004
"""of its time."""
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
        on_kept: likewise for each state that is whole in memory, and again once it is copied (`copied`).
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
        on_kept: OnKept = ignore_kept,
        memory: Memory | None = None,
        peer: Address | None = None,
        restored_index: int | None = None,
        mean_s_between_losses: float = 3600.0,
        data: DataIdentity | None = None,
    ) -> None:
        self._config, self._data = config, data
        self._device = device
        self._epoch = epoch
        self._on_committed = on_committed
        self._memory = memory
        self._rates = memory.rates if memory else Rates()
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
        self._arenas = memory.get_arenas(device) if memory else HostArenas(device, count=1)
        self._stager = Stager(self._arenas)
        every_s = config.checkpoint.node_disk_every_s
        self._tier = memory and MemoryTier(
            memory,
            self._arenas,
            peer=peer,
            disk=DiskTier(memory, every_s=every_s) if config.checkpoint.node_disk else None,
            epoch=epoch,
            restored_index=restored_index,
            on_kept=on_kept if self._rank == 0 else ignore_kept,
        )
        paced = partial(Pace, start_step=start.step, mean_s_between_losses=mean_s_between_losses)
        self._paces: dict[Tier, Pace] = {
            "memory": paced(
                every_steps=config.checkpoint.memory_every_steps,
                at_first=True,
                first_cost=SaveCost(stall_s=0, busy_s=0),
                longest_s=min(_LONGEST_UNKEPT_S, config.checkpoint.longest_s),
                most_share=_MOST_SHARE,
            ),
            "storage": paced(
                every_steps=config.checkpoint.every_steps,
                at_first=False,
                first_cost=_FIRST_COST,
                longest_s=config.checkpoint.longest_s,
            ),
        }
        self._live: dict[str, Tensor] = {}
        self._live_moments: list[Any] = []
        self._plan: Future[SavePlan] | None = None
        self._saves: dict[Tier, Flight] = {}
        self._start_step = start.step
        self._has_plans = memory is None and config.checkpoint.every_steps > 0
        """The ranks have agreed on intervals, or need none."""
        self._voted_on: frozenset[Tier] = frozenset()
        """The saves that the open vote is about."""
        self._leaving: Tier | None = None
        """The save that may still be on the device of some rank: there is no room for another one beside it."""
        self._late: Tier | None = None
        """The save that waits for that."""
        self._save_s: list[float] = []
        self._step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._called_s: float | None = None
        self._num_failed = 0
        """Saves to the storage in a row; the same on all ranks."""
        self._committed: Progress | None = None
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
        took_s = self._save_s if tier == "storage" or self._tier is None else self._tier.safe_s
        return statistics.median(took_s) if took_s else None

    def estimate_hand_over_s(self) -> float:
        """Return how long this rank needs to bring its part to where the next world finds it, begun now."""
        num_bytes = self._own_bytes
        index = self._choose_arena("leaving")
        is_found = index is None or self._arenas.is_found(index)
        way = self._rates.to_host if is_found else self._rates.to_new_host
        ahead = self._saves[self._leaving].staged.arena.nbytes if self._leaving else 0
        return way.estimate_s(num_bytes) + self._rates.to_host.estimate_s(ahead)

    def estimate_copy_s(self) -> float:
        """Return how long it takes to bring this rank's part from one node to another."""
        return self._rates.to_peer.estimate_s(self._own_bytes)

    @property
    def _own_bytes(self) -> int:
        """How much of the state this rank saves; 0 until that is known."""
        plan = self._plan
        return plan.result().own.num_bytes if plan and plan.done() and not plan.exception() else 0

    @property
    def is_keeping(self) -> bool:
        """Tell whether a state is on its way to memory, copies aside; the same on all ranks."""
        return self._leaving is not None or "memory" in self._saves

    def get_unkept_steps(self, step: int) -> tuple[int, int] | None:
        """Return how many steps would be made again now if a trainer, and if a node were lost.

        None if no state is kept in memory.
        """
        if self._tier is None:
            return None
        at = [kept.progress.step if kept else self._start_step for kept in (self._tier.newest, self._tier.safe)]
        committed = self._committed.step if self._committed else self._start_step
        return step - max(at[0], committed), step - max(at[1], committed)

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
        urgency: Urgency = "routine",
        follows: bool = True,
    ) -> bool:
        """Start to save the state as it is now, unless the last save of its kind is still under way.

        One that is due while the storage still takes the last one goes to memory only. One that is due while another is
        on its way off the device is due again after the next step. The state must not change before `wait_staged`.

        Args:
            extra: JSON values that `restore` gives back; rank 0's count.
            urgency: what other states may be given up for this one.
            follows: copies on other nodes follow.

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
        is_planned = self._plan is not None
        plan = self._get_plan()
        stall_from_s = start_s if is_planned else time.monotonic()  # to plan is no part of what the next one costs
        index = self._choose_arena(urgency)
        if index is None:
            return False
        if self._tier:
            self._tier.begin(index)
        live = {**state, get_rng_name(self._device, self._rank): get_rng_state(self._device)}
        save = Flight(
            tier=tier,
            progress=progress,
            start_s=start_s,
            is_first_touch=not self._arenas.is_found(index),
            staged=self._stager.stage(live, plan.own, plan.held, index=index),
            plan=plan,
            follows=follows,
            build_manifest=self._describe(state, progress, extra),
        )
        save.stall_s = time.monotonic() - stall_from_s
        self._saves[tier] = save
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
            start_s = time.monotonic()
            save.staged.wait_on_device()
            save.stall_s += time.monotonic() - start_s

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
        is_busy = self._tier is not None and (self._tier.is_copying or self._tier.is_storing)
        if self._saves or is_busy or not self._has_plans:
            self._open_vote()
        return self._committed

    def finish(self, tier: Tier = "storage") -> Progress | None:
        """Wait until nothing of a kind is in flight, copies included, and return the newest progress committed.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        self._finish_keeping()
        if tier == "memory":
            self._finish_copies()
        elif save := self._saves.get("storage"):
            self._settle(save)
        return self._committed

    def _finish_keeping(self) -> None:
        """Wait until no state is on its way to memory."""
        self._count_vote()
        for save in list(self._saves.values()):
            if not save.is_counted:
                self._take_kept(save, is_kept=bool(self._votes.agree(not save.kept.result())))

    def _finish_copies(self) -> None:
        """Wait until no copies are under way."""
        self._count_vote()
        if self._tier:
            self._tier.finish_copies(lambda is_well: bool(self._votes.agree(is_well)))

    def save_now(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Save the state as it is now, and return whether it is committed: the same on all ranks.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self.finish() != progress:
            self._finish_keeping()
            self.start_save(model, optimizer, progress=progress, extra=extra, urgency="leaving")
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

        That is the memory of the nodes; the storage, if that does not work on some rank. Whatever else is under way is
        given up for it.

        Args:
            copies: whether it must outlive this node. Without, a loss before the next world has its own first snapshot
                falls back on what is older: in this world's memories until all have loaded, then in the storage.

        Raises:
            StorageError, CheckpointError: as `poll`.
        """
        if self._tier:
            laps = Laps()
            self._count_vote()
            if (save := self._saves.get("memory")) and save.progress != progress:
                save.staged.give_up()
            self._finish_keeping()
            self._tier.halt_copies()  # of what was kept just now
            if not self._is_kept(progress):
                self._wait_left()
                self.start_save(
                    model, optimizer, progress=progress, extra=extra, tier="memory", urgency="leaving", follows=copies
                )
                laps.end("room")
                self._finish_keeping()
                laps.end("to the host")
            if self._is_kept(progress):
                if copies:
                    self._tier.start_copies()
                    self._finish_copies()
                    laps.end("copies")
                if self._rank == 0:
                    logger.info("step %d is handed over: %s", progress.step, laps)
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
        if self._tier:
            self._tier.halt_copies()  # the next world's states come over the same network
        if self._plan is not None:
            wait([self._plan])  # the next world plans with the same arenas
        for save in self._saves.values():
            save.staged.give_up()  # the next world fills the arenas anew
        self._saves.clear()
        self._votes.close()

    # ---- the votes

    def _open_vote(self) -> None:
        """Ask all ranks what is done, and after how many steps they would save again."""
        committed = [save.committed_s for save in self._saves.values() if save.tier == "storage"]
        step_s = max(statistics.median(self._step_s), 1e-4) if self._step_s else 1.0
        self._voted_on = frozenset(self._saves)
        self._votes.open(
            [
                *chain(*(self._get_kept_ballot(tier) for tier in _TIERS)),
                all(future.done() for future in committed),
                all(save.staged.has_left for save in self._saves.values()),
                *(self._tier.get_ballot() if self._tier else NO_BALLOT),
                *(-self._paces[tier].plan(step_s) for tier in _TIERS),  # the longest counts
            ]
        )

    def _get_kept_ballot(self, tier: Tier) -> tuple[bool, bool]:
        """Return whether this rank's part of a save is in memory, or failed to get there, and whether it is."""
        save = self._saves.get(tier)
        return save is None or save.kept.done(), save is None or (save.kept.done() and not save.kept.result())

    def _count_vote(self) -> None:
        outcome = self._votes.count()
        if outcome is None:
            return
        num_kept = 2 * len(_TIERS)
        kept, (is_written, has_left), others = (
            outcome[:num_kept],
            outcome[num_kept : num_kept + 2],
            outcome[num_kept + 2 :],
        )
        if self._tier:
            self._tier.count([bool(value) for value in others[: len(NO_BALLOT)]])
        self._has_plans = True
        if has_left and self._leaving in self._voted_on:
            self._leaving = None
        for tier, negative_steps in zip(_TIERS, others[len(NO_BALLOT) :], strict=True):
            self._paces[tier].agree(int(-negative_steps))
        for tier, is_over, is_kept in zip(_TIERS, kept[::2], kept[1::2], strict=True):
            if tier in self._voted_on and is_over and not self._saves[tier].is_counted:
                self._take_kept(self._saves[tier], is_kept=bool(is_kept))
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

    def _take_kept(self, save: Flight, *, is_kept: bool) -> None:
        """Take that a state is in the memory of all nodes, or that it failed to get there."""
        save.is_counted = True
        if save.tier == "memory":
            self._forget("memory")
            self._paces["memory"].measured(SaveCost(stall_s=save.stall_s, busy_s=save.kept_s))
        if self._tier is None:
            return
        problem = save.kept.result()
        if not problem:
            way = self._rates.to_new_host if save.is_first_touch else self._rates.to_host
            way.measured(save.plan.own.num_bytes, save.kept_s)
        if not is_kept:
            if problem and problem != self._problem and not problem.startswith("AbandonedError"):
                self._problem = problem
                logger.warning("step %d is not safe in memory, training goes on: %s", save.progress.step, problem)
            return
        kept = Kept(
            progress=save.progress,
            snapshot=self._get_snapshot(save),
            index=save.staged.index,
            num_bytes=save.plan.own.num_bytes,
            start_s=save.start_s,
        )
        self._tier.take(kept, follows=save.follows)

    def _is_kept(self, progress: Progress) -> bool:
        return bool(self._tier and self._tier.newest and self._tier.newest.progress == progress)

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

    def _choose_arena(self, urgency: Urgency) -> int | None:
        """Return the arena for the next save; None, on all ranks, if it must wait."""
        busy = {save.staged.index for save in self._saves.values()}
        if self._tier:
            return self._tier.choose(busy, urgency)
        return next((index for index in self._arenas.indices if index not in busy), None)

    def _keep(self, save: Flight) -> str:
        assert self._memory is not None
        manifest = save.build_manifest(save.plan.get_shapes(), {})
        return self._memory.fill(save.staged.index, self._get_snapshot(save), save.plan, manifest)

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
