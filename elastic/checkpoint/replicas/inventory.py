"""What a replica server has in memory: one trainer's shard of one snapshot, and what is known about it. No torch
here."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.staging.shared_memory import SharedBuffer
from elastic.transport import PIECE_BYTES

Part = tuple[int, int]
"""Offset and size of a chunk."""


@dataclass(frozen=True, kw_only=True, order=True)
class Snapshot:
    """What a buffer holds: the shard of one rank after one step of one attempt."""

    generation: int
    step: int
    world_size: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class ReplicaInfo:
    """A shard that some replica server has, as it is listed and sent."""

    origin: str
    index: int
    snapshot: Snapshot
    num_bytes: int
    chunks: tuple[Part, ...]
    """In a list the first one alone: the header of the file."""
    checksums: tuple[int, ...] | None
    """CRC-32 of each chunk; None while they are not all known."""
    record: Any
    """JSON value that the trainer gave with it."""
    is_copy: bool
    is_on_disk: bool
    """On the node's disk: what an earlier replica server has left there."""
    node: str


@dataclass(kw_only=True)
class Replica:
    """One buffer and what is known about it. The same `origin` and `index` always mean the same one or a copy."""

    origin: str
    """The trainer that fills it."""
    index: int
    buffer: SharedBuffer
    is_copy: bool
    is_on_disk: bool = False
    """Its buffer is a file that an earlier replica server wrote."""
    generation: int = 0
    """Of the attempt that filled it last, or began to."""
    snapshot: Snapshot | None = None
    """None while it is being filled."""
    num_bytes: int = 0
    chunks: tuple[Part, ...] = ()
    """Each has a checksum of its own."""
    checksums: tuple[int, ...] | None = None
    """Of each chunk; None until all have been taken."""
    record: object = None
    """The trainer's own JSON value."""
    version: int = 0
    """Counts the fillings, so that work for an earlier one gives up."""
    checked: threading.Event = field(default_factory=threading.Event)
    """`checksums` are those of this filling, or it was given up."""

    def begin(self, generation: int) -> None:
        """Make what it holds void: it is about to be filled. The caller has the lock."""
        self.snapshot, self.checksums, self.generation = None, None, generation
        self.version += 1
        self.checked.set()
        self.checked = threading.Event()

    def fill(self, snapshot: Snapshot, *, num_bytes: int, chunks: Sequence[Part], record: object) -> None:
        """Take what it is filled with; it counts from now on. The caller has the lock."""
        self.snapshot, self.num_bytes = snapshot, num_bytes
        self.chunks, self.record = tuple(chunks), record

    def describe(self, node: str) -> ReplicaInfo:
        """Return it as it is listed and sent; it must be filled."""
        assert self.snapshot is not None
        return ReplicaInfo(
            origin=self.origin,
            index=self.index,
            snapshot=self.snapshot,
            num_bytes=self.num_bytes,
            chunks=self.chunks,
            checksums=self.checksums,
            record=self.record,
            is_copy=self.is_copy,
            is_on_disk=self.is_on_disk,
            node=node,
        )


class SupersededError(Exception):
    """The buffer is being filled again, or the result is not wanted any more."""


def cut(replica: Replica, version: int) -> Iterator[memoryview]:
    """Yield the bytes of a filling piece by piece.

    Raises:
        SupersededError: another filling has begun.
    """
    view = replica.buffer.view[: replica.num_bytes]
    for start in range(0, replica.num_bytes, PIECE_BYTES):
        check_current(replica, version)
        yield view[start : start + PIECE_BYTES]
    check_current(replica, version)


def check_current(replica: Replica, version: int) -> None:
    """Make sure that a buffer has not been filled again meanwhile.

    Raises:
        SupersededError: it has.
    """
    if replica.version != version:
        raise SupersededError
