"""The shards that a replica server holds: those of its node's trainers, copies for other nodes, and files. No torch
here."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from elastic.checkpoint.replicas.inventory import Replica, ReplicaInfo, Snapshot
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
        self._replicas: dict[Key, Replica] = {}
        self._origins: set[str] = set()
        """The trainers of this node that are connected: their buffers are theirs to fill again."""
        self._freer = ThreadPoolExecutor(1, "free")

    # ---- with the lock

    def get(self, key: Key) -> Replica | None:
        """Return a shard; the caller has the lock."""
        return self._replicas.get(key)

    def drop(self, replica: Replica) -> None:
        """Let go of a shard; the caller has the lock."""
        replica.version += 1
        replica.snapshot = None
        replica.checked.set()
        del self._replicas[replica.origin, replica.index]
        # takes seconds, and the caller has the lock
        self._freer.submit(replica.buffer.close).add_done_callback(self._tell_failure)

    def require(self, origin: str, index: int) -> Replica:
        """Return a trainer's own buffer; the caller has the lock.

        Raises:
            WireError: it was never handed over.
        """
        replica = self._replicas.get((origin, index))
        if replica is None or replica.is_copy or replica.is_on_disk:
            raise WireError(f"buffer {index} was never handed over")
        return replica

    # ---- without

    def add(self, replica: Replica) -> None:
        """Take a shard of an earlier replica server, or a buffer of a trainer that is connected.

        Raises:
            WireError: another trainer's buffer, or a copy, has its name.
        """
        with self.lock:
            before = self._replicas.get((replica.origin, replica.index))
            if before is not None and before.is_copy:
                raise WireError(f"buffer {replica.index} of {replica.origin} is a copy")
            if not replica.is_on_disk:
                self._origins.add(replica.origin)
            self._replicas[replica.origin, replica.index] = replica

    def leave(self, origin: str) -> None:
        """Take that a trainer is gone: what it was filling is worth nothing."""
        with self.lock:
            self._origins.discard(origin)
            own = [replica for replica in self._replicas.values() if replica.origin == origin and not replica.is_copy]
            for replica in own:
                if replica.snapshot is None:
                    self.drop(replica)

    def list_replicas(self) -> tuple[ReplicaInfo, ...]:
        """Return what is here, at once; of what was filled just now the checksums are not known yet."""
        with self.lock:
            filled = [replica for replica in self._replicas.values() if replica.snapshot is not None]
            return tuple(replica.describe(self.node) for replica in filled)

    def list_state(self, *, generation: int, step: int) -> list[tuple[Replica, int]]:
        """Return the shards of a state that are in memory, own ones and copies, with their versions."""
        with self.lock:
            return [
                (replica, replica.version)
                for replica in self._replicas.values()
                if (own := replica.snapshot)
                and (own.generation, own.step) == (generation, step)
                and not replica.is_on_disk
            ]

    def find(self, origin: str, index: int, snapshot: Snapshot) -> tuple[Replica, int] | None:
        """Return a shard and its version if it is still of this snapshot."""
        with self.lock:
            replica = self._replicas.get((origin, index))
            return (replica, replica.version) if replica is not None and replica.snapshot == snapshot else None

    def retire(self, *, before_generation: int, keep_step: int | None) -> None:
        """Free what a newer attempt has made worthless; `keep_step`, what it started from, stays.

        Buffers of a connected trainer stay: it fills them again.
        """
        with self.lock:
            for replica in list(self._replicas.values()):
                step = replica.snapshot.step if replica.snapshot else None
                is_in_use = not replica.is_copy and not self._is_left(replica)
                if replica.generation < before_generation and not is_in_use and (step is None or step != keep_step):
                    self.drop(replica)

    def measure(self, number: int, *, waits: bool) -> Measured:
        """Return how much memory is held.

        Args:
            number: of the question.
            waits: until all is free that was let go of.
        """
        if waits:
            self._wait_until_free()
        with self.lock:
            in_memory = [replica for replica in self._replicas.values() if not replica.is_on_disk]
            return Measured(
                id=number,
                held_bytes=sum(replica.buffer.num_bytes for replica in in_memory),
                left_bytes=sum(replica.buffer.num_bytes for replica in in_memory if self._is_left(replica)),
                copy_bytes=sum(replica.buffer.num_bytes for replica in in_memory if replica.is_copy),
            )

    def allocate_copy(self, key: Key, num_bytes: int, generation: int) -> Replica:
        """Return memory for a copy, if this node can spare it.

        Raises:
            CheckpointError: it cannot.
        """
        self._wait_until_free()
        with self.lock:
            copies = [replica for replica in self._replicas.values() if replica.is_copy]
            _check_memory(num_bytes, sum(copy.buffer.num_bytes for copy in copies if not copy.num_bytes))
            buffer: SharedBuffer = allocate_buffer(num_bytes, name="copy")
            buffer.populate()  # while the first bytes come
            replica = Replica(origin=key[0], index=key[1], buffer=buffer, is_copy=True, generation=generation)
            self._replicas[key] = replica
            return replica

    def _wait_until_free(self) -> None:
        self._freer.submit(lambda: None).result()  # what was let go of before is free then

    def _is_left(self, replica: Replica) -> bool:
        """Tell whether its trainer has gone."""
        return not replica.is_copy and replica.origin not in self._origins

    def _tell_failure(self, job: "Future[None]") -> None:
        """Say what a job failed of whose result is not waited for."""
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
