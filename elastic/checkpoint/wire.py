"""How trainers and keepers talk: a JSON header, then raw bytes; never a pickle. No torch here.

    4 bytes length | header, a JSON object with "kind" and maybe "bytes" | that many raw bytes

Over a Unix socket a message may carry a file descriptor; who may connect is a matter of file permissions there. Over
TCP each side first proves that it knows the run's secret, without sending it (HMAC-SHA256 of the other's nonce).
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterable
from typing import Any

Header = dict[str, Any]

MAX_HEADER_BYTES = 64 * 2**20
"""Far more than an index of a million chunks; a stranger's first bytes never make us allocate more."""
PIECE_BYTES = 4 * 2**20
"""What is sent or received at a time, so that an abort is noticed soon."""
_NONCE_BYTES = 32


class WireError(OSError):
    """The peer is gone, is not who it should be, or speaks another language."""


class Channel:
    """A connected stream socket that sends and receives whole messages; one thread may receive while others send."""

    def __init__(self, connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._descriptors: list[int] = []
        self._sending = threading.Lock()

    def send(
        self, header: Header, payload: Iterable[memoryview] = (), *, num_bytes: int = 0, descriptor: int | None = None
    ) -> None:
        """Send one message; `payload` yields `num_bytes` in all, and what it raises breaks the channel.

        Raises:
            WireError: the peer is gone.
        """
        text = json.dumps({**header, "bytes": num_bytes}).encode()
        data = struct.pack("!I", len(text)) + text
        with self._sending:
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

    def receive(self) -> Header | None:
        """Return the next header; None when the peer has closed the connection between messages.

        The caller then takes ``header["bytes"]`` raw bytes with `receive_into`.

        Raises:
            WireError: the connection broke, or the message is none of ours.
        """
        size = bytearray(4)
        if not self._fill(memoryview(size), may_end=True):
            return None
        (length,) = struct.unpack("!I", size)
        if length > MAX_HEADER_BYTES:
            raise WireError(f"a header of {length} bytes is none of ours")
        text = bytearray(length)
        self._fill(memoryview(text))
        try:
            header = json.loads(text)
        except ValueError as error:
            raise WireError("a header that is no JSON is none of ours") from error
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):  # pyright: ignore[reportUnknownMemberType] # checked here
            raise WireError("a header without a kind is none of ours")
        num_bytes: Any = header.get("bytes")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType] # JSON
        if not isinstance(num_bytes, int) or num_bytes < 0:
            raise WireError(f"a header with bytes={num_bytes!r} is none of ours")
        return header  # pyright: ignore[reportUnknownVariableType] # JSON

    def receive_into(self, out: memoryview) -> None:
        """Fill `out` with raw bytes.

        Raises:
            WireError: the connection broke before.
        """
        for start in range(0, len(out), PIECE_BYTES):
            self._fill(out[start : start + PIECE_BYTES])

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


def authenticate(connection: socket.socket, secret: str, *, role: str, timeout_s: float = 10.0) -> Channel:
    """Return a channel to a peer that knows the secret too.

    Args:
        role: "keeper" for the side that was called, "caller" for the other: an answer never serves the other side.

    Raises:
        WireError: it does not, or does not answer in time.
    """
    connection.settimeout(timeout_s)
    own = secrets.token_bytes(_NONCE_BYTES)
    other_role = "caller" if role == "keeper" else "keeper"
    try:
        connection.sendall(own)
        theirs = _receive_exactly(connection, _NONCE_BYTES)
        connection.sendall(_prove(secret, role, theirs))
        if not hmac.compare_digest(_receive_exactly(connection, _NONCE_BYTES), _prove(secret, other_role, own)):
            raise WireError("the peer does not know the run's secret")
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise error if isinstance(error, WireError) else WireError(error.errno, f"no handshake ({error})") from error
    return Channel(connection)


def connect(address: tuple[str, int], secret: str, *, timeout_s: float = 5.0) -> Channel:
    """Return a channel to the keeper at an address.

    Raises:
        WireError: nobody is there, or not one of ours.
    """
    try:
        connection = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise WireError(error.errno, f"{address[0]}:{address[1]} does not answer ({error})") from error
    return authenticate(connection, secret, role="caller", timeout_s=timeout_s)


def _prove(secret: str, role: str, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), role.encode() + nonce, "sha256")


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = connection.recv(num_bytes - len(data))
        if not more:
            raise WireError("the peer closed the connection during the handshake")
        data += more
    return data
