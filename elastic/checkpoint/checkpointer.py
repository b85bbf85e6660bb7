"""Save the state of all ranks in the background: to the memory of the nodes often, to the storage now and then.

The training thread only starts the copy to host memory; threads and the node's replica server do the rest. A state that
is whole in the memory of the nodes counts at once; its copies on other nodes trail behind (`PeerTier`). Nothing is
decided by one rank alone: what fails on one fails on all, at the same step.

    when         schedule.py: after which steps
    what counts  consensus.py: the ballot; protocol.py: ranks say what is done, and take what all have done
    how          staging/ off the device; tiers/{memory,peer,disk,storage}.py, and durable/writer.py
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.checkpoint.bandwidth import Rates
from elastic.checkpoint.consensus import Votes
from elastic.checkpoint.durable.writer import DurableWriter
from elastic.checkpoint.exchange import can_send
from elastic.checkpoint.forecast import Forecast
from elastic.checkpoint.in_flight import InFlightSave
from elastic.checkpoint.protocol import SaveProtocol
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.schedule import Schedule, Tier
from elastic.checkpoint.staging.buffer_choice import Urgency
from elastic.checkpoint.staging.description import WorldDescription
from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.staging.live_plan import LivePlan
from elastic.checkpoint.staging.stager import Stager
from elastic.checkpoint.tiers.device import Offer, get_room_bytes, list_chunks, take_over
from elastic.checkpoint.tiers.disk import DiskTier
from elastic.checkpoint.tiers.memory import MemoryTier, OnKept, ignore_kept
from elastic.checkpoint.tiers.storage import StorageTier
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import get_rng_name, get_rng_state
from elastic.config import RunConfig
from elastic.ports import Address, DataIdentity, Progress
from elastic.stopwatch import Stopwatch
from elastic.storage import Storage

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0


class Checkpointer:
    """Saves one run from one rank of one world: one save to the storage at a time, and one to memory beside it.

    All methods but `wait_staged` and `close` are called by all ranks at the same step. Create it once the default
    process group exists; `close` it before that group goes. What raises says why no more checkpoints can be made:
    SavesFailedError after too many failed saves in a row, StaleGenerationError, CheckpointError.

    Args:
        storage: the run's.
        device: where the state lies.
        generation: number of the attempt; names this world's files.
        start: where this world begins.
        check_generation, before_commit: see `DurableWriter`.
        on_committed: called by rank 0, on the training thread, for each checkpoint that became visible.
        on_kept: likewise for each state that is whole in memory, and again once it is copied (`copied`).
        memory: where snapshots are kept; None: states go to the storage only.
        peer: the replica server that shall have copies of this node's snapshots.
        restored_index: of this process' buffer that holds the state that was restored; it is filled again last.
        mean_s_between_losses: what planned intervals are made for.
        data: what the state is trained on; every manifest says it.
    """

    def __init__(
        self,
        storage: Storage,
        config: RunConfig,
        *,
        device: torch.device,
        generation: int,
        start: Progress = Progress(),  # noqa: B008 (frozen)
        check_generation: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
        on_committed: Callable[[Progress], None] = lambda _: None,
        on_kept: OnKept = ignore_kept,
        memory: Memory | None = None,
        peer: Address | None = None,
        restored_index: int | None = None,
        mean_s_between_losses: float = 3600.0,
        data: DataIdentity | None = None,
    ) -> None:
        self._device, self._generation = device, generation
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        timeout, saves = timedelta(seconds=config.fault.collective_timeout_s), config.checkpoint
        self._schedule = Schedule(
            saves, start_step=start.step, mean_s_between_losses=mean_s_between_losses, has_memory=memory is not None
        )
        self._writer = DurableWriter(
            storage,
            generation=generation,
            keep_last=saves.keep_last,
            timeout=timeout,
            check_generation=check_generation,
            before_commit=before_commit,
        )
        self._memory, rates = memory, memory.rates if memory else Rates()
        self._buffers = memory.get_buffers(device) if memory else HostBuffers(device, count=1)
        self._tier = memory and MemoryTier(
            memory,
            self._buffers,
            peer=peer,
            disk=DiskTier(memory, every_s=saves.node_disk_every_s) if saves.node_disk else None,
            generation=generation,
            restored_index=restored_index,
            on_kept=on_kept if self._rank == 0 else ignore_kept,
        )
        self._stager = Stager(self._buffers)
        self._plan = LivePlan(
            self._buffers, device=device, generation=generation, rank=self._rank, world_size=self._world_size
        )
        self._world = WorldDescription(
            config=config, data=data, device=device, generation=generation, world_size=self._world_size
        )
        self._protocol = SaveProtocol(
            Votes(timeout),
            schedule=self._schedule,
            memory=self._tier,
            storage=StorageTier(rank=self._rank, max_failed=saves.max_failed_saves, on_committed=on_committed),
            rates=rates,
        )
        self._saves = self._protocol.saves
        self.forecast = Forecast(
            self._protocol,
            plan=self._plan,
            buffers=self._buffers,
            choose_last=partial(self._choose_buffer, "leaving"),
            rates=rates,
            start_step=start.step,
        )
        self._late: Tier | None = None
        """The save that waits until another one has left the device."""

    def plan_ahead(self, live: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Get ready for the first save beside the first steps, if the state (`get_live_state`) is all there."""
        self._plan.begin(live, optimizer)

    def get_due(self, step: int) -> Tier | None:
        """Return where the state after this step shall go, if anywhere; the same on all ranks."""
        return self._late or self._schedule.get_due(step)

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
        """
        assert progress.step > 0, "there is nothing to save before the first step"
        self.poll()
        if tier == "storage" and "storage" in self._saves and self._memory:
            tier = "memory"  # the storage is slower than the rhythm; memory is not
        if tier in self._saves:
            return False
        self._late = tier if self._saves.on_device else None
        if self._late:
            return False
        start_s = time.monotonic()
        state = self._plan.collect(model, optimizer)
        is_planned = self._plan.is_begun
        plan = self._plan.get()
        stall_from_s = start_s if is_planned else time.monotonic()  # to plan is no part of what the next one costs
        index = self._choose_buffer(urgency)
        if index is None:
            return False
        if self._tier:
            self._tier.begin(index)
        live = {**state, get_rng_name(self._device, self._rank): get_rng_state(self._device)}
        save = InFlightSave(
            tier=tier,
            progress=progress,
            snapshot=Snapshot(
                generation=self._generation, step=progress.step, world_size=self._world_size, rank=self._rank
            ),
            start_s=start_s,
            is_first_touch=not self._buffers.is_found(index),
            staged=self._stager.stage(live, plan.own, plan.held, index=index),
            plan=plan,
            follows=follows,
            build_manifest=self._world.describe(state, progress, extra),
        )
        save.stall_s = time.monotonic() - stall_from_s
        self._saves.add(save, has_device=self._device.type == "cuda")
        self._schedule.started(tier, progress.step)
        save.start(memory=self._memory, writer=self._writer)
        return True

    def wait_staged(self) -> None:
        """Let no later change of the state reach the saves in flight; call it right before `optimizer.step`."""
        for save in self._saves:
            start_s = time.monotonic()
            save.staged.wait_on_device()
            save.stall_s += time.monotonic() - start_s

    def poll(self) -> Progress | None:
        """Return the newest progress that this checkpointer committed; call it (or `start_save`) once a step."""
        self._schedule.stepped()
        self._protocol.poll()
        return self._protocol.storage.committed

    def finish(self, tier: Tier = "storage") -> Progress | None:
        """Wait until nothing of a kind is in flight, copies included, and return the newest progress committed."""
        self._protocol.finish_memory()
        if tier == "memory":
            self._protocol.finish_copies()
        else:
            self._protocol.finish_storage()
        return self._protocol.storage.committed

    def save_now(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Save the state as it is now, and return whether it is committed: the same on all ranks."""
        if self.finish() != progress:
            self._protocol.finish_memory()
            self.start_save(model, optimizer, progress=progress, extra=extra, urgency="leaving")
            self.finish()
        return self._protocol.storage.committed == progress

    def save_last(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Progress, extra: Mapping[str, object]
    ) -> bool:
        """Return when the state as it is now is committed; try again if a save fails, after longer pauses each time."""
        while not self.save_now(model, optimizer, progress=progress, extra=extra):
            time.sleep(min(2.0**self._protocol.storage.num_failed, _LONGEST_PAUSE_S))
        return True

    def hand_over(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        progress: Progress,
        extra: Mapping[str, object],
        copies: bool,
        leaves: bool = False,
    ) -> bool:
        """Put the state as it is now where the next world finds it soonest, and return whether it is there.

        That is the devices of the ranks that stay, with the memory of the nodes behind them; the storage, if neither
        works on some rank. Whatever else is under way is given up for it.

        Args:
            copies: whether it must outlive this node. Without, a loss before the next world has its own first snapshot
                falls back on what is older: in this world's memories until all have loaded, then in the storage.
            leaves: this rank is not in the next world.
        """
        if self._tier:
            stopwatch = Stopwatch()
            self._protocol.give_way_to(progress)
            copies = not self._protocol.agree(not copies)
            if not self._protocol.is_in_memory(progress):
                self._protocol.wait_left_device()
                is_begun = self.start_save(
                    model, optimizer, progress=progress, extra=extra, tier="memory", urgency="leaving", follows=copies
                )
                stopwatch.lap("room")
                if is_begun and self._hand_over_devices(leaves=leaves):
                    stopwatch.lap("to devices that stay")
                    if self._rank == 0:
                        logger.info("step %d is handed over: %s", progress.step, stopwatch)
                    return True
                self._protocol.finish_memory()
                stopwatch.lap("to the host")
            if self._protocol.is_in_memory(progress):
                if copies:
                    self._tier.start_copies()
                    self._protocol.finish_copies()
                    stopwatch.lap("copies")
                if self._rank == 0:
                    logger.info("step %d is handed over: %s", progress.step, stopwatch)
                return True
        return self.save_now(model, optimizer, progress=progress, extra=extra)

    def _hand_over_devices(self, *, leaves: bool) -> bool:
        """Give the part of each rank that leaves to the devices of the others, and return whether all of it is there.

        Then the snapshot that was begun goes on to host memory beside the end of this world.
        """
        save = self._saves["memory"]
        copy = save.staged.copy
        if self._memory is None or copy is None or (self._world_size > 1 and not can_send(self._device, None)):
            return False
        memory = copy.memory
        offer = Offer(leaves=leaves, room_bytes=get_room_bytes(self._device))
        if memory is not None and copy.is_cloned:
            copy.wait_on_device()
            chunks = list_chunks(save.plan.own.entries, copy.places)
            offer = replace(offer, file=save.plan.own_file, num_bytes=memory.numel(), chunks=chunks)
        taken = take_over(offer, memory, device=self._device, votes=self._protocol.group)
        if taken.is_whole:
            self._saves.remove("memory")
            self._memory.trail(save.snapshot, save.kept, taken.rows)
        return taken.is_whole

    def close(self) -> None:
        """Give up what is in flight; after this nothing of this world reaches the storage. Works with dead peers."""
        self._writer.close()
        if self._tier:
            self._tier.halt_copies()  # the next world's states come over the same network
        self._plan.wait()  # the next world plans with the same buffers
        self._protocol.close()  # and fills them anew

    def _choose_buffer(self, urgency: Urgency) -> int | None:
        """Return the buffer for the next save; None, on all ranks, if it must wait."""
        busy = {save.staged.index for save in self._saves}
        if self._tier:
            return self._tier.choose(busy, urgency)
        return next((index for index in self._buffers.indices if index not in busy), None)
