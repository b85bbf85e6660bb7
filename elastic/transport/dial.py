"""The caller's side: connect to one of ours, or find that nobody is there who could prove it."""

import contextlib
import os
import selectors
import socket
import time
from pathlib import Path

from elastic.transport.acceptor import Peer, advance, get_peer_user
from elastic.transport.frames import WireError
from elastic.transport.handshake import HANDSHAKE_S, Handshake, Purpose

_SOCKET = "socket"


class Dial:
    """A call under way: for a thread that has other things to do. It can be watched for reading; call `turn` then.

    Close it when it is over: that leaves the connection that `turn` has returned alone.

    Args:
        address: of the one that is called.

    Raises:
        WireError: it cannot even be tried.
    """

    def __init__(
        self, address: tuple[str, int], secret: str, *, purpose: Purpose, timeout_s: float = HANDSHAKE_S
    ) -> None:
        self._name = f"{address[0]}:{address[1]}"
        self._until_s = time.monotonic() + timeout_s
        self._handshake = Handshake(secret, role="caller", purpose=purpose)
        self.is_connected = False
        """Something listens there, whatever it is."""
        try:
            self._selector = selectors.EpollSelector()
            try:
                self._socket: socket.socket | None = socket.socket(_get_family(address[0]))
            except OSError:
                self._selector.close()
                raise
        except OSError as error:
            raise WireError(error.errno, f"{self._name} cannot be called ({error.strerror})") from error
        self._socket.setblocking(False)
        try:
            self._socket.connect(address)
        except BlockingIOError:  # EINPROGRESS
            pass
        except OSError as error:
            self.close()
            raise WireError(error.errno, f"{self._name} does not answer ({error.strerror})") from error
        self._selector.register(self._socket, selectors.EVENT_WRITE)

    def fileno(self) -> int:
        """Return a descriptor that can be read when `turn` has something to do."""
        return self._selector.fileno()

    def get_descriptors(self) -> list[int]:
        """Return all that is open here, none of which is a forked child's business."""
        return [self._selector.fileno(), *([] if self._socket is None else [self._socket.fileno()])]

    def turn(self, timeout_s: float = 0.0) -> Peer | None:
        """Return the one that was called, once it has proved itself; None: not yet.

        Raises:
            WireError: nobody is there, or not one of ours.
        """
        connection = self._socket
        assert connection is not None
        try:
            if self._selector.select(timeout_s):
                self._advance(connection)
            if self._handshake.seals is None:
                if time.monotonic() > self._until_s:
                    raise WireError("it says nothing")
                return None
        except OSError as error:
            raise WireError(error.errno, f"{self._name} does not answer as one of ours ({error})") from error
        self._selector.unregister(connection)
        self._socket = None
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(connection, self._handshake.seals)

    def close(self) -> None:
        """Give up, or be done."""
        self._selector.close()
        if self._socket is not None:
            self._socket.close()

    def _advance(self, connection: socket.socket) -> None:
        if not self.is_connected:
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            if connection.getsockname() == connection.getpeername():
                raise WireError("with a port of one's own one may meet oneself")
            self.is_connected = True
            self._selector.modify(connection, selectors.EVENT_READ)
            connection.send(self._handshake.start())
            return
        with contextlib.suppress(BlockingIOError):
            advance(connection, self._handshake)


def connect(address: tuple[str, int], secret: str, *, purpose: Purpose, timeout_s: float = HANDSHAKE_S) -> Peer:
    """Return the one of ours at an address.

    Raises:
        WireError: nobody is there, or not one of ours.
    """
    until_s = time.monotonic() + timeout_s
    with contextlib.closing(Dial(address, secret, purpose=purpose, timeout_s=timeout_s)) as dial:
        while (peer := dial.turn(max(0.001, until_s - time.monotonic()))) is None:
            pass
    return peer


def listen_unix(folder: Path) -> socket.socket:
    """Return a socket that listens in a folder of this user's alone, in place of one that did before.

    Raises:
        WireError: others can write to the folder.
    """
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise WireError(
            f"{folder} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}: not ours alone"
        )
    path = folder / _SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def connect_unix(folder: Path) -> Peer | None:
    """Connect to the process of this user that listens in a folder; None if none does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(folder / _SOCKET))
        if get_peer_user(connection) == os.getuid():
            return Peer(connection, None)
    except OSError:
        pass
    connection.close()
    return None


def _get_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
