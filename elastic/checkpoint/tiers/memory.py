"""What the memories of the nodes hold of one world's states: the newest that is whole, and the newest that is safe.

A state is whole once each rank's part is in its own node's memory: it survives the trainers. It is safe once each part
is copied to another node as well; then nothing falls back on earlier worlds any more. Now and then a safe state goes on
to the nodes' disks.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from elastic.checkpoint.consensus import Job, TierBallot
from elastic.checkpoint.staging.buffer_choice import Urgency, Uses, choose_buffer
from elastic.checkpoint.staging.device_to_host import AbandonedError
from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.tiers.disk import DiskTier
from elastic.checkpoint.tiers.peer import Kept, PeerTier
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.ports import Address, Progress

logger = logging.getLogger(__name__)


class OnKept(Protocol):
    """Takes a state that is kept in memory."""

    def __call__(self, progress: Progress, *, copied: bool) -> None:
        """Take it once it is whole, and once more when no node alone has any part of it."""
        ...


def ignore_kept(progress: Progress, *, copied: bool) -> None:
    """Take it, and do nothing."""


class MemoryTier:
    """One rank's part; all methods are called by all ranks at the same step.

    Args:
        peer: the replica server that gets copies; None: there are none.
        disk: where safe states go on to, if anywhere.
        generation: number of the attempt.
        restored_index: of the buffer that holds the state that was restored: what this world falls back on at first.
        on_kept: called for each state, on the training thread.
    """

    def __init__(
        self,
        memory: Memory,
        buffers: HostBuffers,
        *,
        peer: Address | None,
        disk: DiskTier | None,
        generation: int,
        restored_index: int | None,
        on_kept: OnKept,
    ) -> None:
        self._memory, self._buffers = memory, buffers
        self._disk, self._generation, self._on_kept = disk, generation, on_kept
        self._peers = PeerTier(memory, peer, memory.rates.to_peer)
        self._restored_index = restored_index
        self._filled: list[int] = []
        """The buffers that this world has filled, the last one last."""
        self._newest_index: int | None = None
        self._safe_index: int | None = None
        self.newest: Kept | None = None
        """The newest state that is whole."""
        self.safe: Kept | None = None
        """The newest that is safe."""
        self.safe_s: list[float] = []
        """What it took from its begin until each was."""
        self._problem = ""

    @property
    def is_copying(self) -> bool:
        """Tell whether copies are under way."""
        return self._peers.index is not None

    @property
    def is_busy(self) -> bool:
        """Tell whether a state is on its way to other nodes' memory or to a disk."""
        return self.is_copying or (self._disk is not None and self._disk.index is not None)

    def choose(self, busy: set[int], urgency: Urgency) -> int | None:
        """Return the buffer for the next state; None, on all ranks, if it must wait.

        Args:
            busy: those that are being filled, or written to the storage.
        """
        if self._disk and self._disk.index is not None:
            busy = busy | {self._disk.index}
        uses = Uses(
            busy=busy,
            newest=self._newest_index,
            safe=self._safe_index,
            copying=self._peers.index,
            restored=self._restored_index,
        )
        indices = self._buffers.indices
        oldest_first = [index for index in indices if index not in self._filled]
        oldest_first += [index for index in self._filled if index in indices]
        return choose_buffer(oldest_first, uses, urgency, limit=self._buffers.limit)

    def begin(self, index: int) -> None:
        """Take that a buffer is about to be filled: what it held is gone."""
        if index == self._peers.index:
            self._peers.halt()
        if index == self._newest_index:
            self.newest = self._newest_index = None
        if index == self._safe_index:
            self._safe_index = None
        if index == self._restored_index:
            self._restored_index = None
        self._filled = [*(other for other in self._filled if other != index), index]
        self._memory.begin(index, generation=self._generation)

    def settle(self, kept: Kept, *, is_kept: bool, problem: str, follows: bool) -> None:
        """Take that a state is in the memory of all nodes, or failed to get there.

        Args:
            kept: the state, as this rank has it.
            is_kept: all ranks say so.
            problem: of this rank; empty if it has none.
            follows: its copies follow, unless others are under way.
        """
        if not is_kept:
            if problem and problem != self._problem and not problem.startswith(AbandonedError.__name__):
                self._problem = problem
                logger.warning("step %d is not safe in memory, training goes on: %s", kept.progress.step, problem)
            return
        self.newest, self._newest_index = kept, kept.index
        self._on_kept(kept.progress, copied=False)
        if follows:
            self.start_copies()

    def start_copies(self) -> None:
        """Copy the newest state, unless copies of another one are under way, or it is safe."""
        if self.newest is not None and self.newest != self.safe:
            self._peers.start(self.newest)

    def halt_copies(self) -> None:
        """Give up the copies under way."""
        self._peers.halt()

    def finish_copies(self, agree: Callable[[bool], bool]) -> None:
        """Wait until no copies are under way.

        Args:
            agree: whether all ranks say so.
        """
        while self.is_copying:
            self._count_copies(Job(is_over=True, is_done=agree(self._peers.wait())))

    def get_ballot(self) -> TierBallot:
        """Return what this rank says of its copy and of its disk, for `count`."""
        return TierBallot(
            copy=self._peers.get_job(),
            disk_write=self._disk.get_job() if self._disk else Job(),
            is_disk_write_due=self._disk is not None and self._disk.get_is_due(),
        )

    def count(self, ballot: TierBallot) -> None:
        """Take what all ranks have said."""
        if self._disk:
            self._disk.count(ballot.disk_write, is_due=ballot.is_disk_write_due)
        self._count_copies(ballot.copy)

    def _count_copies(self, copy: Job) -> None:
        if copied := self._peers.count(copy):
            self._take_safe(copied)
            self.start_copies()

    def _take_safe(self, kept: Kept) -> None:
        """Take that no node alone has any part of a state any more."""
        is_first, self.safe, self._safe_index = self.safe is None, kept, kept.index
        if is_first:  # from now on nothing falls back on what earlier attempts have left
            self._memory.retire(before_generation=self._generation, keep_step=None)
            self._buffers.release_outgrown()
        self.safe_s.append(time.monotonic() - kept.start_s)
        if self._disk and self._disk.is_due:
            self._disk.start(kept.index, kept.snapshot)
        self._on_kept(kept.progress, copied=True)
