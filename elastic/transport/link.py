"""Typed messages over one connection, for threads that must not wait, and for those that may."""

import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import Generic, Literal, TypeVar

from elastic.transport.acceptor import Peer
from elastic.transport.frames import Decoder, WireError, encode
from elastic.transport.typed import Vocabulary, to_header

MAX_MESSAGE_BYTES = 8 * 2**20
"""A row of a batch of a million samples, or the places of ten thousand nodes' replica servers."""
MAX_BACKLOG_BYTES = 4 * MAX_MESSAGE_BYTES
STUCK_S = 10.0
"""A peer that takes nothing for this long is gone."""
_READ_BYTES = 1 << 16

_M = TypeVar("_M")


class Link(Generic[_M]):
    """A connection that sends and receives whole messages. Any thread may send, one may receive.

    A message is sent whole or it is the last one: where that fails the connection is broken, which the receiving thread
    sees as its end.

    Args:
        hears: what the peer may say.
        sends: "waiting": until the peer takes it. "at once": what it does not take now is kept, and must be sent with
            `flush` when it takes more; for a thread that has others to serve.
        limit_bytes: of a message, in both directions.
    """

    def __init__(
        self,
        peer: Peer,
        hears: Vocabulary[_M],
        *,
        sends: Literal["waiting", "at once"],
        limit_bytes: int = MAX_MESSAGE_BYTES,
        stuck_s: float = STUCK_S,
    ) -> None:
        self.fault = ""
        """Why this end has broken the connection, if it has."""
        self._socket, self._hears, self._limit_bytes, self._stuck_s = peer.socket, hears, limit_bytes, stuck_s
        self._seal = peer.seals.sent if peer.seals else None
        self._decoder = Decoder(limit_bytes=limit_bytes, seal=peer.seals.received if peer.seals else None)
        self._sending = threading.Lock()
        self._backlog = bytearray()
        self._taken_s = 0.0
        """With a backlog: when the peer took something last, or the backlog began."""
        peer.socket.setblocking(sends == "waiting")

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    @property
    def has_backlog(self) -> bool:
        """Whether there is something to `flush`."""
        return bool(self._backlog)

    def send(self, message: object) -> bool:
        """Send one message, or keep it for `flush`; False if the peer is gone (its end is seen by `receive`).

        Raises:
            ValueError: the message is longer than the peer takes.
        """
        with self._sending:
            if self.fault:
                return False
            data = encode(to_header(message), seal=self._seal, limit_bytes=self._limit_bytes)
            try:
                if self._socket.gettimeout() is None:
                    self._socket.sendall(data)
                else:
                    self._send_some(data)
            except OSError as error:
                self._break(f"it could not be sent to ({error.strerror or error})")
        return not self.fault

    def flush(self) -> None:
        """Send what the peer had no room for; break the connection if it has taken nothing for too long."""
        with self._sending:
            if self.fault or not self._backlog:
                return
            try:
                self._send_some(b"")
            except OSError as error:
                self._break(f"it could not be sent to ({error.strerror or error})")

    def can_receive(self) -> bool:
        """Tell whether `receive` has something to do now."""
        return _is_readable(self._socket, 0)

    def receive(self, timeout_s: float | None = None) -> list[_M] | None:
        """Return the messages that one read completes (maybe none); None when the peer is gone or broke the rules.

        Args:
            timeout_s: return no messages if nothing came for this long; None: wait for ever, but not where messages are
                sent "at once".
        """
        try:
            if timeout_s is not None and not _is_readable(self._socket, timeout_s):
                return []
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data or self.fault:
            return None
        try:
            return [self._hears.parse(header) for header in self._decoder.feed(data)]
        except WireError as error:
            with self._sending:
                self._break(str(error))
            return None

    def close(self) -> None:
        """Close the socket. Where messages are sent at once, no other thread sends into what has its number next."""
        if self._socket.gettimeout() is None:
            self._socket.close()
            return
        with self._sending:
            self.fault = self.fault or "it was closed"
            self._socket.close()

    def _send_some(self, data: bytes) -> None:
        now_s = time.monotonic()
        if not self._backlog:
            self._taken_s = now_s
        self._backlog += data
        try:
            sent = self._socket.send(self._backlog)
        except BlockingIOError:
            sent = 0
        if sent:
            self._taken_s = now_s
            del self._backlog[:sent]
        if len(self._backlog) > MAX_BACKLOG_BYTES:
            self._break(f"it left {len(self._backlog)} bytes of messages untaken")
        elif self._backlog and now_s - self._taken_s > self._stuck_s:
            self._break(f"it took nothing for {self._stuck_s:g} s")

    def _break(self, fault: str) -> None:
        """End the connection for both sides; the receiving thread is woken, and closes it."""
        self.fault = self.fault or fault
        self._backlog.clear()
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    if connection.fileno() < 0:  # another thread of ours has closed it
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    poll = select.poll()  # select(2) knows no descriptor above 1023
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))
