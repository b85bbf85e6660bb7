"""One JSON object per line over a stream socket: how agent, host, trainer and coordinator talk."""

import json
import select
import socket
import threading
from pathlib import Path
from typing import Any

Message = dict[str, Any]
_SOCKET = "socket"


class Link:
    """A connected socket that sends and receives whole messages. Any thread may send, one may receive."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._sending = threading.Lock()
        self._rest = b""

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, kind: str, **fields: object) -> bool:
        """Send one message; False if the peer is gone (its end is seen by `receive`)."""
        line = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        try:
            with self._sending:
                self._sock.sendall(line)
        except OSError:
            return False
        return True

    def receive(self, timeout_s: float | None = None) -> list[Message] | None:
        """Return the messages that one read completes (maybe none); None when the peer is gone.

        Args:
            timeout_s: return no messages if nothing came for this long; None waits for ever.
        """
        if timeout_s is not None and not select.select([self._sock], [], [], timeout_s)[0]:
            return []
        try:
            data = self._sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def listen(folder: Path) -> socket.socket:
    """Return a socket that listens in a folder, in place of one that did before."""
    path = folder / _SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def connect(folder: Path) -> Link | None:
    """Connect to whoever listens in a folder; None if nobody does."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(folder / _SOCKET))
    except OSError:
        sock.close()
        return None
    return Link(sock)
