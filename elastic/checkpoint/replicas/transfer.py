"""Copies of shards from one replica server's memory to another's, over several connections side by side. No torch here.

    push     -> open         which copy this will be of what; or refused, before a byte was sent
    stripe   -> taken        on each connection: some chunks in a row, and their bytes
    seal     -> pushed       what the sender says the checksums are; the copy counts once they are those of what came

The bytes go from memory to the network within the kernel. What comes is checksummed chunk by chunk while it is in the
processor's cache. The sender checksums its own meanwhile, if that is not done yet.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.replicas.inventory import Part, Replica, SupersededError, check_current
from elastic.checkpoint.replicas.messages import (
    COPY_ANSWERS,
    CopyAnswer,
    Opened,
    Push,
    Pushed,
    Refused,
    Seal,
    Stripe,
    Taken,
)
from elastic.checkpoint.staging.shared_memory import SharedBuffer
from elastic.processes import be_nice
from elastic.transport import PIECE_BYTES, Channel, WireError, connect

NUM_STREAMS = max(2, min(12, (os.cpu_count() or 1) // 2))
"""Connections side by side: one does not fill a fast link, nor do the two threads at its ends."""
_NUM_PLACES = 2
"""Copies of one trainer's shards at its peer: while one is sent, the one before counts."""
_PEER_TIMEOUT_S = 30.0
"""A lost machine sends no FIN; a living one takes its bytes and checks a copy sooner than this."""

_SUMMED_BYTES = 2**20
"""Read, checksummed and sent at a time, in the processor's cache."""

_A = TypeVar("_A", Opened, Taken, Pushed)


class CopySender:
    """What one trainer's copies need: connections to the peer, and which of them is the newest there. One at a time.

    Args:
        node: of the sender.
        secret: opens the replica servers of the other nodes.
    """

    def __init__(self, node: str, secret: str) -> None:
        self._node, self._secret = node, secret
        self._channels: list[Channel[CopyAnswer]] = []
        self._address: tuple[str, int] | None = None
        self._place = 0
        """Of the newest copy that counts."""
        self._is_halted = threading.Event()
        self._is_sending = False
        self._lock = threading.Lock()

    def halt(self) -> None:
        """Give up the copy under way, if there is one: its part of the network is needed elsewhere, now."""
        with self._lock:
            self._is_halted.set()
            channels = list(self._channels) if self._is_sending else []
        for channel in channels:  # which wakes the threads that wait for the peer
            channel.close()

    def begin(self) -> Callable[[], bool]:
        """Return what tells whether a copy that is asked for now was halted since."""
        with self._lock:
            self._is_halted = is_halted = threading.Event()
        return is_halted.is_set

    def send(self, replica: Replica, version: int, address: tuple[str, int], is_halted: Callable[[], bool]) -> None:
        """Send a filling to the replica server at an address; return when it counts there.

        Raises:
            SupersededError: it is being filled again, or was halted.
            WireError: the peer is gone, or refuses.
        """

        def check() -> None:
            if is_halted():
                raise SupersededError
            check_current(replica, version)

        with self._lock:
            self._is_sending = True
        try:
            check()
            self._connect(address)
            self._send(replica, check)
        except (OSError, SupersededError) as error:
            self.forget()
            if is_halted():
                raise SupersededError from error
            raise
        finally:
            with self._lock:
                self._is_sending = False

    def _send(self, replica: Replica, check: Callable[[], None]) -> None:
        lead, place = self._channels[0], (self._place + 1) % _NUM_PLACES
        check()
        shard = replace(replica.describe(self._node), index=place, checksums=None)
        ticket = _ask(lead, Push(shard=shard, capacity=replica.buffer.num_bytes), Opened).ticket
        stripes = [
            Stripe(origin=replica.origin, index=place, ticket=ticket, first=first, stop=stop)
            for first, stop in cut_stripes(replica.chunks, len(self._channels))
        ]
        with ThreadPoolExecutor(len(stripes), "stripe", initializer=be_nice) as pool:
            sent = [
                pool.submit(self._send_stripe, channel, stripe, replica, check)
                for channel, stripe in zip(self._channels, stripes, strict=False)
            ]
        for one in sent:
            one.result()
        replica.checked.wait()
        check()
        assert replica.checksums is not None, "it is current"
        _ask(lead, Seal(origin=replica.origin, index=place, ticket=ticket, checksums=replica.checksums), Pushed)
        self._place = place

    def _send_stripe(
        self, channel: Channel[CopyAnswer], stripe: Stripe, replica: Replica, check: Callable[[], None]
    ) -> None:
        try:
            parts = replica.chunks[stripe.first : stripe.stop]
            channel.send_file(stripe, replica.buffer.descriptor, join(parts), check=check)
            _take(channel, Taken)
        except BaseException:
            for each in self._channels:  # the other stripes are of no use any more
                each.close()
            raise

    def _connect(self, address: tuple[str, int]) -> None:
        if self._channels and self._address == address:
            return
        self.forget()
        self._address = address
        for _ in range(NUM_STREAMS):
            channel = Channel(connect(address, self._secret, purpose="replicas"), COPY_ANSWERS)
            channel.set_timeout(_PEER_TIMEOUT_S)
            with self._lock:
                self._channels.append(channel)

    def forget(self) -> None:
        """Close the connections."""
        with self._lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()


def cut_stripes(chunks: Sequence[Part], num_stripes: int) -> list[tuple[int, int]]:
    """Return first and stop of the chunks of each stripe: about as many bytes in each, none empty."""
    total_bytes = sum(size for _, size in chunks)
    edges, done_bytes = [0], 0
    for number, (_, size) in enumerate(chunks, start=1):
        done_bytes += size
        if done_bytes * num_stripes >= total_bytes * len(edges):
            edges.append(number)
            while done_bytes * num_stripes >= total_bytes * len(edges) and len(edges) < num_stripes:
                edges.append(number)
    return [(first, stop) for first, stop in pairwise(edges) if first < stop]


def join(parts: Sequence[Part]) -> list[Part]:
    """Return the same bytes in as few parts as there are gaps."""
    joined: list[Part] = []
    for offset, size in parts:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((offset, size))
    return joined


def receive_parts(
    channel: Channel[Any], buffer: SharedBuffer, parts: Sequence[Part], *, check: Callable[[], None]
) -> list[int]:
    """Receive parts of a shard, one after the other, where they belong in a buffer; return the checksum of each.

    It is mapped: to write it as a file is, one thread at a time can.
    """
    checksums: list[int] = []
    for group in _group(parts):
        check()
        for offset, size in join(group):
            channel.receive_into(buffer.view[offset : offset + size])
        # while they are in the processor's cache
        checksums += [crc32(buffer.view[offset : offset + size]) for offset, size in group]
    return checksums


def checksum_parts(buffer: SharedBuffer, parts: Sequence[Part]) -> list[int]:
    """Return the checksum of each part of a buffer.

    They are copied to a small buffer first, which stays in the processor's cache: to map the pages that a trainer has
    filled takes longer than that, and as long as the checksums themselves.
    """
    checksums: list[int] = []
    with _borrow(parts) as cache:
        for offset, size in parts:
            part = cache[:size]
            buffer.read_into(offset, part)
            checksums.append(crc32(part))
    return checksums


def _group(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield parts in groups of a piece or a little more: each group costs some turns of the interpreter."""
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if sum(size for _, size in group) >= PIECE_BYTES:
            yield group
            group = []
    if group:
        yield group


class SummedPieces:
    """Bytes of a buffer, and their checksum once all have been taken."""

    def __init__(self, buffer: SharedBuffer, start: int, size: int, *, check: Callable[[], None]) -> None:
        self._buffer, self._start, self._stop, self._check = buffer, start, start + size, check
        self.crc32 = 0

    def __iter__(self) -> Iterator[memoryview]:
        cache = memoryview(bytearray(_SUMMED_BYTES))
        for start in range(self._start, self._stop, _SUMMED_BYTES):
            piece = cache[: min(_SUMMED_BYTES, self._stop - start)]
            self._buffer.read_into(start, piece)
            self._check()
            self.crc32 = crc32(piece, self.crc32)
            yield piece


def _borrow(parts: Sequence[Part]) -> memoryview:
    return memoryview(bytearray(max(PIECE_BYTES, max((size for _, size in parts), default=0))))


def _ask(channel: Channel[CopyAnswer], message: Push | Seal, expected: type[_A]) -> _A:
    channel.send(message)
    return _take(channel, expected)


def _take(channel: Channel[CopyAnswer], expected: type[_A]) -> _A:
    answer = channel.receive()
    if not isinstance(answer, expected):
        problem = answer.problem if isinstance(answer, Refused) else "the peer is gone"
        raise WireError(f"the copy was refused: {problem}")
    return answer
