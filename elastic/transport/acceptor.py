"""A listening socket to which anybody may connect, and which hands over only those who have proved themselves."""

import contextlib
import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from elastic.transport.frames import Seals, WireError
from elastic.transport.handshake import HANDSHAKE_S, Handshake, Purpose

MOST_PENDING = 128
"""Connections that have yet to prove themselves; one more than these takes the place of the oldest."""
_MOST_AT_ONCE = 64
"""Connections that are taken before the caller's thread may do something else."""
_PAUSE_S = 0.5
_SAY_EVERY_S = 60.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Peer:
    """A connected process that may say something. Its socket blocks."""

    socket: socket.socket
    seals: Seals | None


@dataclass(kw_only=True)
class _Pending:
    socket: socket.socket
    handshake: Handshake | None
    """None: it need only say something."""
    until_s: float


class Acceptor:
    """Greets whoever connects without waiting for anyone; never raises for what a stranger or the kernel does.

    It can be watched for reading like a socket; call `turn` then, and now and then besides.

    Args:
        listener: bound and listening; closed with this.
        say: takes a line about strangers, or about what keeps others from connecting: one of a kind in a minute.
        secret: what callers must know; None, for a Unix socket: they are processes of this user, and say something.
        purpose: what is served here.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        say: Callable[[str], None],
        secret: str | None,
        purpose: Purpose = "replicas",
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        assert secret is not None or listener.family == socket.AF_UNIX
        self._listener, self._secret, self._handshake_s = listener, secret, handshake_s
        self._purpose: Purpose = purpose
        self._say = say
        self._said_s: dict[str, float] = {}
        listener.setblocking(False)
        self._selector = selectors.EpollSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._pending: dict[int, _Pending] = {}
        """By descriptor, oldest first."""
        self._paused_until_s: float | None = None

    def fileno(self) -> int:
        """Return a descriptor that can be read when `turn` has something to do."""
        return self._selector.fileno()

    def get_descriptors(self) -> list[int]:
        """Return all that is open here, none of which is a forked child's business."""
        return [self._selector.fileno(), self._listener.fileno(), *self._pending]

    def turn(self, timeout_s: float = 0.0) -> list[Peer]:
        """Return who has proved to be one of ours by now, maybe after waiting for the next event for so long."""
        peers: list[Peer] = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif (pending := self._pending.get(key.fd)) is key.data:
                assert pending is not None
                peers += self._advance(pending)
        now_s = time.monotonic()
        for pending in [each for each in self._pending.values() if each.until_s < now_s]:
            self._refuse(pending, "it was connected and said nothing")
        if self._paused_until_s is not None and now_s >= self._paused_until_s:
            self._paused_until_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        return peers

    def close(self) -> None:
        """Let nobody in any more."""
        for pending in self._pending.values():
            pending.socket.close()
        self._pending.clear()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause(error)
                    break
                continue  # it was faster gone than we came; accept(2) names a dozen ways
            if self._secret is not None or self._is_own_user(connection):
                self._begin(connection)

    def _pause(self, error: OSError) -> None:
        """Leave callers waiting for a moment: what is lacking may be back then, and asking on is a busy loop."""
        self._selector.unregister(self._listener)
        self._paused_until_s = time.monotonic() + _PAUSE_S
        self._tell("room", f"nobody can connect for now: {error.strerror} (errno {error.errno}); it is tried again")

    def _is_own_user(self, connection: socket.socket) -> bool:
        if (user := get_peer_user(connection)) == os.getuid():
            return True
        connection.close()
        self._tell("stranger", f"a connection was refused: it came from user {user}")
        return False

    def _begin(self, connection: socket.socket) -> None:
        if len(self._pending) >= MOST_PENDING:
            self._refuse(next(iter(self._pending.values())), f"{MOST_PENDING} others came after it and it said nothing")
        connection.setblocking(False)
        secret = self._secret
        pending = _Pending(
            socket=connection,
            handshake=None if secret is None else Handshake(secret, role="called", purpose=self._purpose),
            until_s=time.monotonic() + self._handshake_s,
        )
        self._pending[connection.fileno()] = pending
        self._selector.register(connection, selectors.EVENT_READ, pending)

    def _advance(self, pending: _Pending) -> list[Peer]:
        """Read no more than the greeting: what follows it is for the one that takes the connection."""
        seals = None
        if pending.handshake:
            try:
                advance(pending.socket, pending.handshake)
            except BlockingIOError:
                return []
            except OSError as error:
                self._refuse(pending, str(error))
                return []
            if (seals := pending.handshake.seals) is None:
                return []
            pending.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._forget(pending)
        pending.socket.setblocking(True)
        return [Peer(pending.socket, seals)]

    def _refuse(self, pending: _Pending, reason: str) -> None:
        whence = "a connection"
        if pending.handshake:
            with contextlib.suppress(OSError):  # it is gone
                whence += f" from {pending.socket.getpeername()[0]}"
        self._forget(pending)
        pending.socket.close()
        self._tell("stranger", f"{whence} was refused: {reason}")

    def _forget(self, pending: _Pending) -> None:
        self._selector.unregister(pending.socket)
        del self._pending[pending.socket.fileno()]

    def _tell(self, kind: str, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s.get(kind, -_SAY_EVERY_S) >= _SAY_EVERY_S:
            self._said_s[kind] = now_s
            self._say(text)


def advance(connection: socket.socket, handshake: Handshake) -> None:
    """Go on with a greeting over a socket that does not block.

    Raises:
        BlockingIOError: nothing has come.
        WireError: the peer is gone, or not one of ours.
        OSError: the connection broke.
    """
    answer = handshake.feed(connection.recv(handshake.num_wanted))
    if connection.send(answer) != len(answer) if answer else False:
        raise WireError("the peer does not take an answer")


def get_peer_user(connection: socket.socket) -> int:
    """Return the user of the process at the other end of a Unix socket."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user
