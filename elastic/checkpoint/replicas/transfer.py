"""Copies of shards from one keeper's memory to another's, over several connections side by side. No torch here.

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
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.replicas.inventory import Holding, SupersededError, check_current, describe
from elastic.checkpoint.staging.shared_memory import Arena
from elastic.processes import be_nice
from elastic.transport import PIECE_BYTES, Channel, Header, WireError, connect

NUM_STREAMS = max(2, min(12, (os.cpu_count() or 1) // 2))
"""Connections side by side: one does not fill a fast link, nor do the two threads at its ends."""
_NUM_PLACES = 2
"""Copies of one trainer's shards at its peer: while one is sent, the one before counts."""
_PEER_TIMEOUT_S = 30.0
"""A lost machine sends no FIN; a living one takes its bytes and checks a copy sooner than this."""

_SUMMED_BYTES = 2**20
"""Read, checksummed and sent at a time, in the processor's cache."""

Part = tuple[int, int]
"""Offset and size of a chunk."""


class CopySender:
    """What one trainer's copies need: connections to the peer, and which of them is the newest there. One at a time.

    Args:
        node: of the sender.
        secret: opens the keepers of the other nodes.
    """

    def __init__(self, node: str, secret: str) -> None:
        self._node, self._secret = node, secret
        self._channels: list[Channel] = []
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
        for channel in channels:  # which wakes who waits for the peer
            channel.close()

    def begin(self) -> Callable[[], bool]:
        """Return what tells whether a copy that is asked for now was halted since."""
        with self._lock:
            self._is_halted = is_halted = threading.Event()
        return is_halted.is_set

    def send(self, holding: Holding, generation: int, address: tuple[str, int], is_halted: Callable[[], bool]) -> None:
        """Send a filling to the keeper at an address; return when it counts there.

        Raises:
            SupersededError: it is being filled again, or was halted.
            WireError: the peer is gone, or refuses.
        """

        def check() -> None:
            if is_halted():
                raise SupersededError
            check_current(holding, generation)

        with self._lock:
            self._is_sending = True
        try:
            check()
            self._connect(address)
            self._send(holding, check)
        except (OSError, SupersededError) as error:
            self.forget()
            if is_halted():
                raise SupersededError from error
            raise
        finally:
            with self._lock:
                self._is_sending = False

    def _send(self, holding: Holding, check: Callable[[], None]) -> None:
        lead, place = self._channels[0], (self._place + 1) % _NUM_PLACES
        about = {**describe(holding, self._node), "index": place, "checksums": None}
        check()
        opened = _ask(lead, {"kind": "push", **about, "capacity": holding.arena.num_bytes}, "open")
        copy = {"origin": holding.origin, "index": place, "ticket": opened["ticket"]}
        stripes = cut_stripes(holding.chunks, len(self._channels))
        with ThreadPoolExecutor(len(stripes), "stripe", initializer=be_nice) as pool:
            sent = [
                pool.submit(
                    self._send_stripe, channel, {**copy, "kind": "stripe", "first": first, "stop": stop}, holding, check
                )
                for channel, (first, stop) in zip(self._channels, stripes, strict=False)
            ]
        for one in sent:
            one.result()
        holding.checked.wait()
        check()
        assert holding.checksums is not None, "it is current"
        _ask(lead, {**copy, "kind": "seal", "checksums": holding.checksums}, "pushed")
        self._place = place

    def _send_stripe(self, channel: Channel, header: Header, holding: Holding, check: Callable[[], None]) -> None:
        try:
            parts = holding.chunks[header["first"] : header["stop"]]
            channel.send_file(header, holding.arena.descriptor, join(parts), check=check)
            _take(channel, "taken")
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
            channel = Channel(connect(address, self._secret, purpose="keeper"))
            channel.set_timeout(_PEER_TIMEOUT_S)
            with self._lock:
                self._channels.append(channel)

    def forget(self) -> None:
        """Close the connections."""
        with self._lock:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()


@dataclass(kw_only=True)
class Incoming:
    """A copy that comes, at its receiver."""

    holding: Holding
    message: Header
    """That announced it."""
    ticket: int
    """The generation of the holding that it will be; what comes with another one is of a copy that was given up."""
    checksums: list[int | None] = field(default_factory=list[int | None])
    """Of what has come."""
    num_writers: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def chunks(self) -> list[Part]:
        """Return offset and size of each chunk."""
        return [(int(offset), int(size)) for offset, size in self.message["chunks"]]

    def take(self, channel: Channel, message: Header) -> None:
        """Receive a stripe.

        Raises:
            WireError: the connection broke, or it is no stripe of this copy.
            SupersededError: another copy takes its place.
        """
        first, stop = int(message["first"]), int(message["stop"])
        parts = self.chunks[first:stop]
        if not 0 <= first < stop <= len(self.checksums) or int(message["bytes"]) != sum(size for _, size in parts):
            raise WireError(f"chunks {first} to {stop} are no stripe of this copy")
        with self._changed:
            check_current(self.holding, self.ticket)
            self.num_writers += 1
        try:
            taken = receive_parts(
                channel, self.holding.arena, parts, check=lambda: check_current(self.holding, self.ticket)
            )
            self.checksums[first:stop] = taken
        finally:
            with self._changed:
                self.num_writers -= 1
                self._changed.notify_all()

    def wait_until_left(self, timeout_s: float) -> bool:
        """Return whether nobody writes to its memory any more, once it was superseded."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_writers == 0, timeout_s)


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


def receive_parts(channel: Channel, arena: Arena, parts: Sequence[Part], *, check: Callable[[], None]) -> list[int]:
    """Receive parts of a shard, one after the other, where they belong in an arena; return the checksum of each.

    It is mapped: to write it as a file is, one thread at a time can.
    """
    checksums: list[int] = []
    for group in _group(parts):
        check()
        for offset, size in join(group):
            channel.receive_into(arena.view[offset : offset + size])
        # while they are in the processor's cache
        checksums += [crc32(arena.view[offset : offset + size]) for offset, size in group]
    return checksums


def checksum_parts(arena: Arena, parts: Sequence[Part]) -> list[int]:
    """Return the checksum of each part of an arena.

    They are copied to a small buffer first, which stays in the processor's cache: to map the pages that a trainer has
    filled takes longer than that, and as long as the checksums themselves.
    """
    checksums: list[int] = []
    with _borrow(parts) as buffer:
        for offset, size in parts:
            part = buffer[:size]
            arena.read_into(offset, part)
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
    """Bytes of an arena, and their checksum once all have been taken."""

    def __init__(self, arena: Arena, start: int, size: int, *, check: Callable[[], None]) -> None:
        self._arena, self._start, self._stop, self._check = arena, start, start + size, check
        self.crc32 = 0

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_SUMMED_BYTES))
        for start in range(self._start, self._stop, _SUMMED_BYTES):
            piece = buffer[: min(_SUMMED_BYTES, self._stop - start)]
            self._arena.read_into(start, piece)
            self._check()
            self.crc32 = crc32(piece, self.crc32)
            yield piece


def _borrow(parts: Sequence[Part]) -> memoryview:
    return memoryview(bytearray(max(PIECE_BYTES, max((size for _, size in parts), default=0))))


def _ask(channel: Channel, header: Header, expected: str) -> dict[str, Any]:
    channel.send(header)
    return _take(channel, expected)


def _take(channel: Channel, expected: str) -> dict[str, Any]:
    answer = channel.receive()
    if answer is None or answer["kind"] != expected:
        raise WireError(f"the copy was refused: {(answer or {}).get('problem', 'the peer is gone')}")
    return answer
