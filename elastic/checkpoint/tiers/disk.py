"""Now and then a snapshot also goes to the disks of the nodes: which one, all ranks agree on."""

import logging
import time
from concurrent.futures import Future

from elastic.checkpoint.consensus import Job
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.tiers.trainer_memory import Memory

logger = logging.getLogger(__name__)


class DiskTier:
    """One rank's part; `count` and `start` are called by all ranks at the same step.

    Args:
        every_s: at least so long from the start of one write to the start of the next.
    """

    def __init__(self, memory: Memory, *, every_s: float) -> None:
        self._memory = memory
        self._every_s = every_s
        self._started_s = time.monotonic()
        self._stored: Future[str] | None = None
        self._state = (0, 0)
        self._complete: tuple[int, int] | None = None
        self._problem = ""
        self.index: int | None = None
        """The buffer that is being written, on all ranks; it must not be filled."""
        self.is_due = False
        """The next snapshot shall be written; the same on all ranks."""

    def get_job(self) -> Job:
        """Return how this rank's write stands."""
        if self._stored is None:
            return Job()
        return Job(is_over=self._stored.done(), is_done=self._stored.done() and not _get_problem(self._stored))

    def get_is_due(self) -> bool:
        """Tell whether this rank would write the next snapshot."""
        return time.monotonic() - self._started_s >= self._every_s

    def count(self, write: Job, *, is_due: bool) -> None:
        """Take what all ranks have said."""
        if self._stored is not None and write.is_over:
            if write.is_done:
                self._complete = self._state
            elif (problem := _get_problem(self._stored)) and problem != self._problem:
                self._problem = problem
                logger.warning("step %d is not on this node's disk, training goes on: %s", self._state[1], problem)
            self._stored = self.index = None
        self.is_due = is_due and self._stored is None

    def start(self, index: int, snapshot: Snapshot) -> None:
        """Begin to write the snapshot in a buffer."""
        self._started_s, self.is_due, self.index = time.monotonic(), False, index
        self._state = (snapshot.generation, snapshot.step)
        self._stored = self._memory.store(snapshot, complete=self._complete)


def _get_problem(stored: Future[str]) -> str:
    return str(stored.exception() or stored.result())
