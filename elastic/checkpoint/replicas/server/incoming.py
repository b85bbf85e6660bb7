"""Copies of other nodes' shards, as they come; see `transfer` for the messages. No torch here."""

import threading
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.replicas.inventory import Replica, ReplicaInfo, SupersededError, check_current
from elastic.checkpoint.replicas.messages import Opened, Push, Pushed, Refused, Seal, Stripe, Taken
from elastic.checkpoint.replicas.server.store import Store
from elastic.checkpoint.replicas.transfer import receive_parts
from elastic.errors import CheckpointError
from elastic.processes import be_nice
from elastic.transport import Channel, WireError

_LEFT_S = 2.0
"""A connection of a copy that was given up is gone by then; else its memory is left to it."""


@dataclass(kw_only=True)
class Incoming:
    """A copy that comes, at its receiver."""

    replica: Replica
    shard: ReplicaInfo
    """As it was announced."""
    ticket: int
    """The version of the replica that it will be; what comes with another one is of a copy that was given up."""
    checksums: list[int | None] = field(default_factory=list[int | None])
    """Of what has come."""
    num_writers: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, channel: Channel[Any], stripe: Stripe) -> None:
        """Receive a stripe.

        Raises:
            WireError: the connection broke, or it is no stripe of this copy.
            SupersededError: another copy takes its place.
        """
        first, stop = stripe.first, stripe.stop
        parts = self.shard.chunks[first:stop]
        if not 0 <= first < stop <= len(self.checksums) or channel.payload_bytes != sum(size for _, size in parts):
            raise WireError(f"chunks {first} to {stop} are no stripe of this copy")
        with self._changed:
            check_current(self.replica, self.ticket)
            self.num_writers += 1
        try:
            taken = receive_parts(
                channel, self.replica.buffer, parts, check=lambda: check_current(self.replica, self.ticket)
            )
            self.checksums[first:stop] = taken
        finally:
            with self._changed:
                self.num_writers -= 1
                self._changed.notify_all()

    def wait_until_left(self, timeout_s: float) -> bool:
        """Return whether no thread writes to its memory any more, once it was superseded."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_writers == 0, timeout_s)


class CopyReceiver:
    """Takes copies, each on several connections side by side; any thread may call it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._incoming: dict[tuple[str, int], Incoming] = {}

    def open(self, channel: Channel[Any], message: Push) -> None:
        """Make room for a copy of what another node's trainer has filled; the one that was there is void."""
        shard, capacity = message.shard, message.capacity
        key, generation = (shard.origin, shard.index), shard.snapshot.generation
        _check_shape(shard, capacity)
        with self._store.lock:
            replica, before = self._store.get(key), self._incoming.pop(key, None)
            if replica is not None and not replica.is_copy:
                raise WireError(f"{key} is no copy")
            if replica is not None:
                replica.begin(generation)
        is_left = before is None or before.wait_until_left(_LEFT_S)
        if replica is not None and not (is_left and replica.buffer.num_bytes >= shard.num_bytes):
            with self._store.lock:
                self._store.drop(replica)
            replica = None
        try:
            replica = replica or self._store.allocate_copy(key, capacity, generation)
        except CheckpointError as error:
            channel.send(Refused(problem=str(error)))
            return
        with self._store.lock:
            incoming = Incoming(replica=replica, shard=shard, ticket=replica.version)
            incoming.checksums = [None] * len(shard.chunks)
            self._incoming[key] = incoming
        channel.send(Opened(ticket=incoming.ticket))

    def take(self, channel: Channel[Any], message: Stripe) -> None:
        """Receive some chunks."""
        be_nice()  # it is this connection's thread
        self._find(message).take(channel, message)
        channel.send(Taken())

    def seal(self, channel: Channel[Any], message: Seal) -> None:
        """Let a copy count if it has come whole."""
        incoming = self._find(message)
        shard, replica = incoming.shard, incoming.replica
        with self._store.lock:
            self._incoming.pop((message.origin, message.index), None)
            check_current(replica, incoming.ticket)
            is_same = tuple(incoming.checksums) == message.checksums
            if is_same:
                replica.fill(shard.snapshot, num_bytes=shard.num_bytes, chunks=shard.chunks, record=shard.record)
                replica.checksums = message.checksums
                replica.checked.set()
        channel.send(Pushed() if is_same else Refused(problem="the copy has other bytes than the original"))

    def _find(self, message: Stripe | Seal) -> Incoming:
        with self._store.lock:
            incoming = self._incoming.get((message.origin, message.index))
        if incoming is None or incoming.ticket != message.ticket:
            raise SupersededError
        return incoming


def _check_shape(shard: ReplicaInfo, capacity: int) -> None:
    """Refuse a copy that cannot be where it says.

    Raises:
        WireError: it cannot.
    """
    chunks_fit = all(0 <= offset <= offset + size <= shard.num_bytes for offset, size in shard.chunks)
    if not 0 < shard.num_bytes <= capacity or not chunks_fit:
        raise WireError(f"a copy of {shard.num_bytes} bytes in {capacity}, or its chunks, cannot be")
