"""The shards that a replica server holds: those of its node's trainers, copies for other nodes, and files. No torch
here."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from elastic.checkpoint.replicas.inventory import Held, Holding, Snapshot
from elastic.checkpoint.replicas.messages import Measured
from elastic.checkpoint.staging.host_memory import get_available_bytes
from elastic.checkpoint.staging.shared_memory import GIB, SharedBuffer, allocate_buffer
from elastic.errors import CheckpointError
from elastic.transport import WireError

Key = tuple[str, int]
"""Origin and index."""


class Store:
    """All shards by the trainer that fills them and its number of the buffer.

    Args:
        node: of this replica server.
        say: takes a line for the log.
    """

    def __init__(self, node: str, *, say: Callable[[str], None]) -> None:
        self.node = node
        self.lock = threading.Lock()
        """Held while a shard is looked at or changed."""
        self._say = say
        self._holdings: dict[Key, Holding] = {}
        self._origins: set[str] = set()
        """The trainers of this node that are connected: their buffers are theirs to fill again."""
        self._freer = ThreadPoolExecutor(1, "free")

    # ---- with the lock

    def get(self, key: Key) -> Holding | None:
        """Return a shard; the caller has the lock."""
        return self._holdings.get(key)

    def drop(self, holding: Holding) -> None:
        """Let go of a shard; the caller has the lock."""
        holding.generation += 1
        holding.snapshot = None
        holding.checked.set()
        del self._holdings[holding.origin, holding.index]
        # takes seconds, and the caller has the lock
        self._freer.submit(holding.buffer.close).add_done_callback(self._tell_failure)

    def require(self, origin: str, index: int) -> Holding:
        """Return a trainer's own buffer; the caller has the lock.

        Raises:
            WireError: it was never handed over.
        """
        holding = self._holdings.get((origin, index))
        if holding is None or holding.is_copy or holding.is_on_disk:
            raise WireError(f"buffer {index} was never handed over")
        return holding

    # ---- without

    def add(self, holding: Holding) -> None:
        """Take a shard of an earlier replica server, or a buffer of a trainer that is connected.

        Raises:
            WireError: another trainer's buffer, or a copy, has its name.
        """
        with self.lock:
            before = self._holdings.get((holding.origin, holding.index))
            if before is not None and before.is_copy:
                raise WireError(f"buffer {holding.index} of {holding.origin} is a copy")
            if not holding.is_on_disk:
                self._origins.add(holding.origin)
            self._holdings[holding.origin, holding.index] = holding

    def leave(self, origin: str) -> None:
        """Take that a trainer is gone: what it was filling is worth nothing."""
        with self.lock:
            self._origins.discard(origin)
            own = [holding for holding in self._holdings.values() if holding.origin == origin and not holding.is_copy]
            for holding in own:
                if holding.snapshot is None:
                    self.drop(holding)

    def list_held(self) -> tuple[Held, ...]:
        """Return what is here, at once; of what was filled just now the checksums are not known yet."""
        with self.lock:
            held = [holding for holding in self._holdings.values() if holding.snapshot is not None]
            return tuple(holding.describe(self.node) for holding in held)

    def list_state(self, *, epoch: int, step: int) -> list[tuple[Holding, int]]:
        """Return the shards of a state that are in memory, own ones and copies, with their generations."""
        with self.lock:
            return [
                (holding, holding.generation)
                for holding in self._holdings.values()
                if (own := holding.snapshot) and (own.epoch, own.step) == (epoch, step) and not holding.is_on_disk
            ]

    def find(self, origin: str, index: int, snapshot: Snapshot) -> tuple[Holding, int] | None:
        """Return a shard and its generation if it is still of this snapshot."""
        with self.lock:
            holding = self._holdings.get((origin, index))
            return (holding, holding.generation) if holding is not None and holding.snapshot == snapshot else None

    def retire(self, *, before_epoch: int, keep_step: int | None) -> None:
        """Free what a newer attempt has made worthless; `keep_step`, what it started from, stays.

        Buffers of a connected trainer stay: it fills them again.
        """
        with self.lock:
            for holding in list(self._holdings.values()):
                step = holding.snapshot.step if holding.snapshot else None
                is_in_use = not holding.is_copy and not self._is_left(holding)
                if holding.epoch < before_epoch and not is_in_use and (step is None or step != keep_step):
                    self.drop(holding)

    def measure(self, number: int, *, waits: bool) -> Measured:
        """Return how much memory is held.

        Args:
            number: of the question.
            waits: until all is free that was let go of.
        """
        if waits:
            self._wait_until_free()
        with self.lock:
            in_memory = [holding for holding in self._holdings.values() if not holding.is_on_disk]
            return Measured(
                id=number,
                held_bytes=sum(holding.buffer.num_bytes for holding in in_memory),
                left_bytes=sum(holding.buffer.num_bytes for holding in in_memory if self._is_left(holding)),
                copy_bytes=sum(holding.buffer.num_bytes for holding in in_memory if holding.is_copy),
            )

    def allocate_copy(self, key: Key, num_bytes: int, epoch: int) -> Holding:
        """Return memory for a copy, if this node can spare it.

        Raises:
            CheckpointError: it cannot.
        """
        self._wait_until_free()
        with self.lock:
            copies = [holding for holding in self._holdings.values() if holding.is_copy]
            _check_memory(num_bytes, sum(copy.buffer.num_bytes for copy in copies if not copy.num_bytes))
            buffer: SharedBuffer = allocate_buffer(num_bytes, name="copy")
            buffer.populate()  # while the first bytes come
            holding = Holding(origin=key[0], index=key[1], buffer=buffer, is_copy=True, epoch=epoch)
            self._holdings[key] = holding
            return holding

    def _wait_until_free(self) -> None:
        self._freer.submit(lambda: None).result()  # what was let go of before is free then

    def _is_left(self, holding: Holding) -> bool:
        """Tell whether its trainer has gone."""
        return not holding.is_copy and holding.origin not in self._origins

    def _tell_failure(self, job: "Future[None]") -> None:
        """Say what a job failed of that nobody waits for."""
        if (error := job.exception()) is not None:
            self._say(f"a job in the background failed: {error!r}")


def _check_memory(num_bytes: int, awaited_bytes: int) -> None:
    """Refuse a copy that would take the memory that this node's own trainers need.

    Args:
        awaited_bytes: promised to copies of which none has come whole yet, so that it is not taken up.

    Raises:
        CheckpointError: less is available.
    """
    available = get_available_bytes()
    if available is not None and available < awaited_bytes + num_bytes + GIB // 4:
        raise CheckpointError(
            f"the peer has {available / GIB:.2f} GiB of host memory left, but a copy needs {num_bytes / GIB:.2f} GiB. "
            "Give the nodes more memory, or set checkpoint.memory=node."
        )
