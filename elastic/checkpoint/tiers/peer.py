"""The copies that snapshots have on other nodes: they trail behind, the newest first, one at a time.

A snapshot that is whole in the memory of the nodes survives their trainers. Only with its copies it survives a node.
These take as long as the network does, so the next snapshots do not wait for them: when the copies of one are made, the
newest that there is by then is next, and those between are never copied.
"""

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass

from elastic.checkpoint.bandwidth import Rate
from elastic.checkpoint.consensus import Job
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.ports import Address, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A snapshot that is whole, each shard in the memory of the node that it was made on."""

    progress: Progress
    snapshot: Snapshot
    """This rank's shard of it."""
    index: int
    """Of its buffer."""
    num_bytes: int
    start_s: float
    """When it was begun (`time.monotonic`)."""


class PeerTier:
    """One rank's part; all methods are called by all ranks at the same step.

    Args:
        peer: the replica server that gets the copies; None: none does, and what is whole is as safe as it gets once the
            other ranks' copies are made.
    """

    def __init__(self, memory: Memory, peer: Address | None, rate: Rate) -> None:
        self._memory, self._peer, self._rate = memory, peer, rate
        self._copied: Future[str] | None = None
        self._copied_s = 0.0
        self._copying: Kept | None = None
        self._problem = ""

    @property
    def index(self) -> int | None:
        """Return the buffer that is being copied."""
        return self._copying.index if self._copying else None

    def get_job(self) -> Job:
        """Return how this rank's copy stands."""
        copied = self._copied
        if copied is None:
            return Job()
        return Job(is_over=copied.done(), is_done=copied.done() and not _get_problem(copied))

    def start(self, kept: Kept) -> None:
        """Begin to copy a snapshot if no copy is under way."""
        if self._copying is not None:
            return
        self._copying, self._copied_s = kept, time.monotonic()
        if self._peer is None:
            self._copied = Future()
            self._copied.set_result("")
        else:
            self._copied = self._memory.copy(kept.index, kept.snapshot, peer=self._peer)
            self._copied.add_done_callback(self._measure)

    def count(self, copy: Job) -> Kept | None:
        """Take what all ranks have said; return what is safe now."""
        copying, copied = self._copying, self._copied
        if copying is None or copied is None or not copy.is_over:
            return None
        self._copying = self._copied = None
        if copy.is_done:
            return copying
        problem = _get_problem(copied)
        if problem and problem != self._problem:
            self._problem = problem
            logger.warning("step %d has no copy of this rank's part: %s", copying.progress.step, problem)
        return None

    def wait(self) -> bool:
        """Return once this rank's copy is made, and whether that went well."""
        return self._copied is None or not _get_problem(self._copied)

    def halt(self) -> None:
        """Give up the copies under way."""
        if self._copying is not None:
            self._memory.halt_copies()
            self._copying = self._copied = None

    def _measure(self, copied: Future[str]) -> None:
        kept = self._copying
        if kept is not None and copied is self._copied and not _get_problem(copied):
            self._rate.measured(kept.num_bytes, time.monotonic() - self._copied_s)


def _get_problem(copied: Future[str]) -> str:
    return str(copied.exception() or copied.result())
