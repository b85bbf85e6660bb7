"""A message as bytes, and bytes as messages; no I/O."""

import hmac
import json
import struct
from dataclasses import dataclass
from typing import Any

Header = dict[str, Any]

SEAL_BYTES = 16
_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!Q")


class WireError(OSError):
    """The peer is gone, is not who it should be, or speaks another language."""


class Seal:
    """Marks the frames of one direction of one connection, so that none can be changed, added, dropped or repeated."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def make(self, text: bytes | bytearray) -> bytes:
        """Return the seal of the next frame."""
        seal = hmac.digest(self._key, _NUMBER.pack(self._number) + text, "sha256")[:SEAL_BYTES]
        self._number += 1
        return seal

    def check(self, seal: bytes | bytearray, text: bytes | bytearray) -> None:
        """Take the next frame.

        Raises:
            WireError: it is not what the peer has sent.
        """
        if not hmac.compare_digest(bytes(seal), self.make(text)):
            raise WireError("a message was changed on its way, or is not the peer's")


@dataclass(frozen=True)
class Seals:
    """Those of one side of a connection."""

    sent: Seal
    received: Seal


def encode(header: Header, *, seal: Seal | None, limit_bytes: int) -> bytes:
    """Return a message as a frame.

    Raises:
        ValueError: it is longer than the peer takes.
    """
    text = _ENCODER.encode(header).encode()
    if len(text) > limit_bytes:
        raise ValueError(f"a {header.get('kind')} of {len(text)} bytes is longer than a message may be ({limit_bytes})")
    return _LENGTH.pack(len(text)) + (seal.make(text) if seal else b"") + text


def to_plain(value: object) -> object:
    """Return a part of a message for JSON: a dataclass within another one names its kind too."""
    return {"kind": type(value).__name__, **vars(value)}


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=to_plain)


def parse_length(data: bytes | bytearray | memoryview, *, limit_bytes: int) -> int:
    """Return the length of the text that follows.

    Raises:
        WireError: it is longer than anything that we would send.
    """
    (length,) = _LENGTH.unpack_from(data)
    if length > limit_bytes:
        raise WireError(f"a message of {length} bytes is none of ours")
    return length


def parse(text: bytes | bytearray) -> Header:
    """Return the message that a frame holds.

    Raises:
        WireError: it is none of ours.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets within brackets within brackets
        raise WireError("a message that is no JSON is none of ours") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):  # pyright: ignore[reportUnknownMemberType] # checked here
        raise WireError("a message without a kind is none of ours")
    return header  # pyright: ignore[reportUnknownVariableType] # JSON


class Decoder:
    """Takes bytes as they come and returns the messages that they complete. It keeps no more than one message."""

    def __init__(self, *, limit_bytes: int, seal: Seal | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._seal = seal
        self._head_bytes = _LENGTH.size + (SEAL_BYTES if seal else 0)
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Header]:
        """Take what has come next.

        Raises:
            WireError: it is none of ours; what came with it is lost, and nothing can be understood from now on.
        """
        self._rest += data
        headers: list[Header] = []
        at = 0
        while len(self._rest) - at >= _LENGTH.size:
            length = parse_length(memoryview(self._rest)[at : at + _LENGTH.size], limit_bytes=self._limit_bytes)
            start = at + self._head_bytes
            if len(self._rest) < start + length:
                break
            text = bytes(self._rest[start : start + length])
            if self._seal:
                self._seal.check(self._rest[at + _LENGTH.size : start], text)
            headers.append(parse(text))
            at = start + length
        del self._rest[:at]
        return headers
