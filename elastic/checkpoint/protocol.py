"""How all ranks bring each save to the same end at the same step: they vote on what is done, and count later."""

import torch.distributed as dist

from elastic.checkpoint.bandwidth import Rates
from elastic.checkpoint.consensus import Ballot, TierBallot, Votes
from elastic.checkpoint.in_flight import InFlightSave, InFlightSaves
from elastic.checkpoint.interval import SaveCost
from elastic.checkpoint.schedule import Schedule
from elastic.checkpoint.tiers.memory import MemoryTier
from elastic.checkpoint.tiers.peer import Kept
from elastic.checkpoint.tiers.storage import StorageTier
from elastic.ports import Progress


class SaveProtocol:
    """The saves in flight of one rank, and the tiers that they end in.

    All methods but `close` are called by all ranks at the same step. They raise what `StorageTier.settle` does.

    Args:
        memory: None: no state is kept in memory.
        rates: take what was measured.
    """

    def __init__(
        self, votes: Votes, *, schedule: Schedule, memory: MemoryTier | None, storage: StorageTier, rates: Rates
    ) -> None:
        self.saves = InFlightSaves()
        self.memory, self.storage = memory, storage
        self._votes, self._schedule, self._rates = votes, schedule, rates

    def poll(self) -> None:
        """Count the vote that the last poll opened, whose answer is there without waiting, and open the next."""
        self._count_vote()
        if self.saves or (self.memory and self.memory.is_busy) or not self._schedule.is_agreed:
            self._open_vote()

    def is_in_memory(self, progress: Progress) -> bool:
        """Tell whether a state is the newest that is whole in the memory of the nodes."""
        return bool(self.memory and self.memory.newest and self.memory.newest.progress == progress)

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, on the host; nobody else uses it meanwhile."""
        return self._votes.group

    # ---- to wait for an end

    def agree(self, is_well: bool) -> bool:
        """Return whether all ranks say so, now."""
        self._count_vote()
        return self._votes.agree(is_well)

    def finish_memory(self) -> None:
        """Wait until no state is on its way to memory."""
        self._count_vote()
        for save in self.saves:
            if not save.is_counted:
                self._settle_memory(save, is_kept=self._votes.agree(not save.kept.result()))

    def finish_copies(self) -> None:
        """Wait until no copies are under way."""
        self._count_vote()
        if self.memory:
            self.memory.finish_copies(self._votes.agree)

    def finish_storage(self) -> None:
        """Wait until no state is on its way to the storage."""
        if save := self.saves.get("storage"):
            self._settle_storage(save)

    def give_way_to(self, progress: Progress) -> None:
        """Give up what is on its way to memory or copied, unless it is this state; return when it is over."""
        self._count_vote()
        if (save := self.saves.get("memory")) and save.progress != progress:
            save.staged.give_up()
        self.finish_memory()
        if self.memory:
            self.memory.halt_copies()  # of what was kept just now

    def wait_left_device(self) -> None:
        """Return once no save is on the device of any rank."""
        self._count_vote()
        if self.saves.on_device:
            self.saves[self.saves.on_device].staged.wait_left()
            self._votes.agree(True)
            self.saves.on_device = None

    def close(self) -> None:
        """Give up what is in flight. Works with dead peers."""
        self.saves.clear()
        self._votes.close()

    # ---- votes

    def _open_vote(self) -> None:
        """Ask all ranks what is done, and after how many steps they would save again."""
        self.saves.begin_vote()
        step_s = self._schedule.step_s
        self._votes.open(
            Ballot(
                memory_save=self.saves.get_job("memory"),
                storage_save=self.saves.get_job("storage"),
                is_written=self.saves.is_written,
                has_left_device=self.saves.has_left_device,
                tiers=self.memory.get_ballot() if self.memory else TierBallot(),
                memory_every_steps=self._schedule.memory.plan(step_s),
                storage_every_steps=self._schedule.storage.plan(step_s),
            )
        )

    def _count_vote(self) -> None:
        outcome = self._votes.count()
        if outcome is None:
            return
        if self.memory:
            self.memory.count(outcome.tiers)
        if outcome.has_left_device:
            self.saves.take_left_device()
        self._schedule.agree(
            memory_every_steps=outcome.memory_every_steps, storage_every_steps=outcome.storage_every_steps
        )
        for save, job in (
            (self.saves.get_voted("memory"), outcome.memory_save),
            (self.saves.get_voted("storage"), outcome.storage_save),
        ):
            if save and job.is_over and not save.is_counted:
                self._settle_memory(save, is_kept=job.is_done)
        if outcome.is_written and (save := self.saves.get_voted("storage")):
            self._settle_storage(save)

    # ---- ends

    def _settle_memory(self, save: InFlightSave, *, is_kept: bool) -> None:
        """Take that a state is in the memory of all nodes, or that it failed to get there."""
        save.is_counted = True
        if save.tier == "memory":
            self.saves.remove("memory")
            self._schedule.memory.measured(SaveCost(stall_s=save.stall_s, busy_s=save.kept_s))
        if self.memory is None:
            return
        num_bytes = save.plan.own.num_bytes
        if not (problem := save.kept.result()):
            way = self._rates.to_new_host if save.is_first_touch else self._rates.to_host
            way.measured(num_bytes, save.kept_s)
        kept = Kept(
            progress=save.progress,
            snapshot=save.snapshot,
            index=save.staged.index,
            num_bytes=num_bytes,
            start_s=save.start_s,
        )
        self.memory.settle(kept, is_kept=is_kept, problem=problem, follows=save.follows)

    def _settle_storage(self, save: InFlightSave) -> None:
        """Take how a save to the storage has ended, which is the same for all ranks."""
        self.saves.remove("storage")
        if self.storage.settle(save.progress, save.committed_s):
            self._schedule.storage.measured(SaveCost(stall_s=save.stall_s, busy_s=self.storage.commit_s[-1]))
