"""Messages with raw bytes and file descriptors behind them, for threads that may wait: how snapshots travel."""

import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from elastic.transport.acceptor import Peer
from elastic.transport.frames import SEAL_BYTES, WireError, encode, parse, parse_length
from elastic.transport.typed import Vocabulary, to_header

MAX_HEADER_BYTES = 64 * 2**20
"""Far more than an index of a million chunks. Only who has proved to be one of ours can have as much allocated."""
PIECE_BYTES = 4 * 2**20
"""What is sent or received at a time, so that an abort is noticed soon."""


_M = TypeVar("_M")


class Channel(Generic[_M]):
    """A connected stream socket that sends and receives whole messages; one thread may receive while others send.

    Args:
        hears: what the peer may say.
    """

    def __init__(self, peer: Peer, hears: Vocabulary[_M]) -> None:
        self.payload_bytes = 0
        """Raw bytes that follow the message received last."""
        self._socket, self._hears = peer.socket, hears
        self._seals = peer.seals
        self._descriptors: list[int] = []
        self._sending = threading.Lock()

    def send(
        self, message: object, payload: Iterable[memoryview] = (), *, num_bytes: int = 0, descriptor: int | None = None
    ) -> None:
        """Send one message; `payload` yields `num_bytes` in all, and what it raises breaks the channel.

        Raises:
            WireError: the peer is gone.
        """
        with self._sending:
            seal = self._seals.sent if self._seals else None
            data = encode({**to_header(message), "bytes": num_bytes}, seal=seal, limit_bytes=MAX_HEADER_BYTES)
            try:
                if descriptor is None:
                    self._socket.sendall(data)
                else:
                    sent = socket.send_fds(self._socket, [data], [descriptor])
                    self._socket.sendall(data[sent:])
                for piece in payload:
                    self._socket.sendall(piece)
            except OSError as error:
                self.close()
                raise WireError(error.errno, f"the peer is gone ({error.strerror or error})") from error
            except BaseException:
                self.close()  # half a message is on its way: nothing after it would be understood
                raise

    def send_file(
        self, message: object, descriptor: int, parts: Iterable[tuple[int, int]], *, check: Callable[[], None]
    ) -> None:
        """Send one message whose payload are parts of a file: the kernel takes them from where they are.

        Args:
            parts: offset and size of each.
            check: called before each piece; what it raises breaks the channel.

        Raises:
            WireError: the peer is gone.
        """
        parts = list(parts)
        num_bytes = sum(size for _, size in parts)
        with self._sending:
            seal = self._seals.sent if self._seals else None
            data = encode({**to_header(message), "bytes": num_bytes}, seal=seal, limit_bytes=MAX_HEADER_BYTES)
            try:
                self._socket.sendall(data)
                for offset, size in parts:
                    self._send_part(descriptor, offset, size, check)
            except OSError as error:
                self.close()
                raise WireError(error.errno, f"the peer is gone ({error.strerror or error})") from error
            except BaseException:
                self.close()  # half a message is on its way: nothing after it would be understood
                raise

    def _send_part(self, descriptor: int, offset: int, size: int, check: Callable[[], None]) -> None:
        stop = offset + size
        while offset < stop:
            check()
            try:
                sent = os.sendfile(self._socket.fileno(), descriptor, offset, min(PIECE_BYTES, stop - offset))
            except BlockingIOError:  # it has a timeout, which the kernel does not know
                self._wait_writable()
                continue
            if not sent:
                raise OSError(errno.ENODATA, "the file ends before what was asked for")
            offset += sent

    def _wait_writable(self) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLOUT)
        timeout_s = self._socket.gettimeout()
        if not poll.poll(None if timeout_s is None else 1000 * timeout_s):
            raise TimeoutError("timed out")

    def receive(self) -> _M | None:
        """Return the next message; None when the peer has closed the connection between messages.

        The caller then takes `payload_bytes` raw bytes with `receive_into`.

        Raises:
            WireError: the connection broke, or the message is none of ours.
        """
        try:
            return self._receive()
        except WireError:
            self.close()  # what follows would not be understood
            raise

    def _receive(self) -> _M | None:
        size = bytearray(4)
        if not self._fill(memoryview(size), may_end=True):
            return None
        length = parse_length(size, limit_bytes=MAX_HEADER_BYTES)
        seal, text = bytearray(SEAL_BYTES if self._seals else 0), bytearray(length)
        self._fill(memoryview(seal))
        self._fill(memoryview(text))
        if self._seals:
            self._seals.received.check(seal, text)
        header = parse(text)
        num_bytes: Any = header.pop("bytes", None)
        if type(num_bytes) is not int or num_bytes < 0:
            raise WireError(f"a message with bytes={repr(num_bytes)[:100]} is none of ours")
        self.payload_bytes = num_bytes
        return self._hears.parse(header)

    def receive_into(self, out: memoryview) -> None:
        """Fill `out` with raw bytes.

        Raises:
            WireError: the connection broke before.
        """
        try:
            for start in range(0, len(out), PIECE_BYTES):
                self._fill(out[start : start + PIECE_BYTES])
        except WireError:
            self.close()
            raise

    def can_receive(self, timeout_s: float) -> bool:
        """Wait until `receive` has something to do; False if it has not in time."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(1000 * timeout_s))

    def take_descriptor(self) -> int:
        """Return the oldest file descriptor that came with a message.

        Raises:
            WireError: none has come.
        """
        if not self._descriptors:
            raise WireError("the message should have brought a file descriptor")
        return self._descriptors.pop(0)

    def close(self) -> None:
        """Break the connection; a thread that waits for the peer returns with a `WireError`."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def forget(self) -> None:
        """Let go of a connection that a fork has brought along, without breaking it for the other process."""
        self._socket.close()

    def set_timeout(self, timeout_s: float | None) -> None:
        """Bound each wait for the peer; None waits for ever."""
        self._socket.settimeout(timeout_s)

    def _fill(self, out: memoryview, *, may_end: bool = False) -> bool:
        filled = 0
        is_unix = self._socket.family == socket.AF_UNIX
        while filled < len(out):
            try:
                if is_unix:
                    num_bytes, descriptors = _receive_with_descriptors(self._socket, out[filled:])
                    self._descriptors += descriptors
                else:
                    num_bytes = self._socket.recv_into(out[filled:])
            except OSError as error:
                raise WireError(error.errno, f"the peer is gone ({error.strerror or error})") from error
            if not num_bytes:
                if may_end and not filled:
                    return False
                raise WireError("the peer closed the connection within a message")
            filled += num_bytes
        return True


def _receive_with_descriptors(connection: socket.socket, out: memoryview) -> tuple[int, list[int]]:
    space = socket.CMSG_SPACE(4 * 8)
    num_bytes, ancillary, _, _ = connection.recvmsg_into([out], space, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = data[: len(data) - len(data) % 4]
            descriptors += struct.unpack(f"{len(whole) // 4}i", whole)
    return num_bytes, descriptors
