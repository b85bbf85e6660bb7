"""What a keeper has in memory: one trainer's shard of one snapshot, and what is known about it. No torch here."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.checkpoint.staging.shared_memory import Arena
from elastic.transport import PIECE_BYTES


@dataclass(frozen=True, kw_only=True, order=True)
class Snapshot:
    """What an arena holds: the shard of one rank after one step of one attempt."""

    epoch: int
    step: int
    world_size: int
    rank: int


@dataclass(kw_only=True)
class Holding:
    """One arena and what is known about it. The same `origin` and `index` always mean the same arena or copy of it."""

    origin: str
    """The trainer that fills it."""
    index: int
    arena: Arena
    is_copy: bool
    is_on_disk: bool = False
    """Its arena is a file that an earlier keeper wrote."""
    epoch: int = 0
    """Of the attempt that filled it last, or began to."""
    snapshot: Snapshot | None = None
    """None while it is being filled."""
    num_bytes: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Offset and size of each chunk that has a checksum of its own."""
    checksums: list[int] | None = None
    """Of each chunk; None until all have been taken."""
    record: Any = None
    """The trainer's own JSON value."""
    generation: int = 0
    """Counts the fillings, so that work for an earlier one gives up."""
    checked: threading.Event = field(default_factory=threading.Event)
    """`checksums` are those of this filling, or it was given up."""

    def begin(self, epoch: int) -> None:
        """Make what it holds void: it is about to be filled. The caller has the lock."""
        self.snapshot, self.checksums, self.epoch = None, None, epoch
        self.generation += 1
        self.checked.set()
        self.checked = threading.Event()

    def fill(self, message: Mapping[str, Any], *, num_bytes: int) -> None:
        """Take what it is filled with; it counts from now on. The caller has the lock."""
        self.snapshot = Snapshot(**message["snapshot"])
        self.num_bytes = num_bytes
        self.chunks = [(offset, size) for offset, size in message["chunks"]]
        self.record = message["record"]


class SupersededError(Exception):
    """The arena is being filled again, or nobody waits for the result any more."""


def cut(holding: Holding, generation: int) -> Iterator[memoryview]:
    """Yield the bytes of a filling piece by piece.

    Raises:
        SupersededError: another filling has begun.
    """
    view = holding.arena.view[: holding.num_bytes]
    for start in range(0, holding.num_bytes, PIECE_BYTES):
        check_current(holding, generation)
        yield view[start : start + PIECE_BYTES]
    check_current(holding, generation)


def check_current(holding: Holding, generation: int) -> None:
    """Make sure that an arena has not been filled again meanwhile.

    Raises:
        SupersededError: it has.
    """
    if holding.generation != generation:
        raise SupersededError


def describe(holding: Holding, node: str) -> dict[str, Any]:
    """Return a holding as it is listed and sent."""
    assert holding.snapshot is not None
    return {
        "origin": holding.origin,
        "index": holding.index,
        "snapshot": asdict(holding.snapshot),
        "num_bytes": holding.num_bytes,
        "chunks": holding.chunks,
        "checksums": holding.checksums,
        "record": holding.record,
        "is_copy": holding.is_copy,
        "is_on_disk": holding.is_on_disk,
        "node": node,
    }
