"""What any process with the run's secret may ask a replica server for: trainers and replica servers of other nodes. No
torch here."""

from collections.abc import Callable
from functools import partial
from typing import Any

from elastic.checkpoint.replicas.inventory import check_current
from elastic.checkpoint.replicas.messages import (
    Data,
    FromAnyone,
    Listed,
    ListedReplica,
    ListReplicas,
    Measure,
    Missing,
    Push,
    Read,
    Retire,
    Seal,
    Stripe,
    Sum,
)
from elastic.checkpoint.replicas.server.incoming import CopyReceiver
from elastic.checkpoint.replicas.server.store import Store
from elastic.checkpoint.replicas.transfer import SummedPieces
from elastic.transport import Channel, WireError


class Desk:
    """Answers what is asked over any connection; any thread may call it."""

    def __init__(self, store: Store) -> None:
        self._store, self._copies = store, CopyReceiver(store)

    def obey(self, channel: Channel[Any], message: FromAnyone) -> None:
        """Do what a message asks for, and answer.

        Raises:
            WireError: it cannot be meant so.
            SupersededError: it is about something that is gone.
        """
        match message:
            case Push():
                self._copies.open(channel, message)
            case Stripe():
                self._copies.take(channel, message)
            case Seal():
                self._copies.seal(channel, message)
            case ListReplicas():
                packed = tuple(map(ListedReplica.pack, self._store.list_replicas()))
                channel.send(Listed(id=message.id, replicas=packed))
            case Read():
                self._read(channel, message)
            case Retire():
                self._store.retire(before_generation=message.before_generation, keep_step=message.keep_step)
            case Measure():
                channel.send(self._store.measure(message.id, waits=message.waits))

    def _read(self, channel: Channel[Any], message: Read) -> None:
        """Send bytes of a shard, and their checksum if that is asked for: where none was taken yet."""
        found = self._store.find(message.origin, message.index, message.snapshot)
        if found is None:
            channel.send(Missing())
            return
        replica, version = found
        start, size = message.start, message.size
        if not 0 <= start <= start + size <= replica.num_bytes:
            raise WireError(f"bytes {start} to {start + size} are outside of {replica.num_bytes}")
        check = partial(check_current, replica, version)
        if message.sums or replica.is_on_disk:  # what the kernel sends of a file goes through its cache
            summed = SummedPieces(replica.buffer, start, size, check=check)
            channel.send(Data(), summed, num_bytes=size)
            if message.sums:
                channel.send(Sum(crc32=summed.crc32))
        else:
            channel.send_file(Data(), replica.buffer.descriptor, [(start, size)], check=check)


def serve(channel: Channel[FromAnyone], desk: Desk, say: Callable[[str], None]) -> None:
    """Answer one connection until it ends, or says what makes no sense: that ends it, and is told once."""
    try:
        while (message := channel.receive()) is not None:
            check_payload(channel, message)
            desk.obey(channel, message)
    except Exception as error:  # whatever it is, the other end must learn that it gets no answers any more
        say(f"a connection ended: {error!r}")
    finally:
        channel.close()


def check_payload(channel: Channel[Any], message: object) -> None:
    """Refuse bytes behind a message that brings none.

    Raises:
        WireError: there are some.
    """
    if channel.payload_bytes and not isinstance(message, Stripe):
        raise WireError(f"a {type(message).__name__} brings no bytes, but {channel.payload_bytes} follow")
