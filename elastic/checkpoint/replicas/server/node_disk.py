"""Snapshots on a disk of the node's own, for the day on which all memories are lost at once. No torch here.

The replica server writes them from the buffers that it holds, whole files only: the bytes of the shard, then what the
replica server knows of it as JSON, then the length and the checksum of that. A file is visible once it is complete
(fsync, rename). The replica server of the next cluster on this machine maps the files that it finds and offers them as
it does its memory; a restore verifies every block. The folder belongs to one life of one run: a run of the
same name that starts from scratch has another one.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.replicas.inventory import ReplicaInfo, Snapshot
from elastic.checkpoint.staging.shared_memory import FileBuffer
from elastic.direct import write_all
from elastic.storage.local import sync
from elastic.strict_json import dump_json
from elastic.transport import build_parser

_MOST_STATES = 4
"""Of so many states files are kept as long as it is not known which one is complete: short worlds leave one each."""
_SUFFIX, _UNFINISHED = ".snapshot", ".tmp"
_TAIL_BYTES = 16
"""Length and CRC-32 of the JSON, each in 8 bytes, big-endian."""


class StateName(NamedTuple):
    """Which state a file is a shard of."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"{self.generation:08d}-{self.step:08d}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One file, mapped."""

    name: str
    about: Mapping[str, Any]
    """As it was given to `write`."""
    buffer: FileBuffer


def to_about(info: ReplicaInfo) -> dict[str, object]:
    """Return what the file of a shard says of it; its keys are those of all files that were ever written."""
    return asdict(info)


def from_about(about: Mapping[str, Any]) -> ReplicaInfo:
    """Return what `to_about` was given.

    Raises:
        KeyError, TypeError, ValueError: the file is of another format.
    """
    return _parse_info(
        {"kind": ReplicaInfo.__name__, **about, "snapshot": {"kind": Snapshot.__name__, **about["snapshot"]}}
    )


_parse_info = build_parser(ReplicaInfo)


class NodeDisk:
    """One run's folder on this node's disk; used by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_all(self) -> Iterator[Stored]:
        """Yield what is here; half-written files are removed, and what is no snapshot of ours is left alone.

        Raises:
            OSError: the disk does not work.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(self._folder.iterdir()):
            if path.suffix == _UNFINISHED:
                path.unlink()
            elif path.suffix == _SUFFIX and (stored := _open(path)):
                yield stored

    def write(self, state: StateName, shard: str, about: Mapping[str, Any], pieces: Iterable[memoryview]) -> None:
        """Write a shard, unless it is here already; return once it would outlive the machine's power.

        Args:
            shard: names it among those of the state; without a slash.
            about: JSON values.
            pieces: its bytes; what they raise leaves no file.

        Raises:
            OSError: the disk does not work, or is full.
        """
        path = self._folder / f"{state}-{shard}{_SUFFIX}"
        if path.exists():
            return
        unfinished = path.with_suffix(_UNFINISHED)
        text = dump_json(about).encode()
        tail = len(text).to_bytes(8, "big") + crc32(text).to_bytes(8, "big")
        try:
            with unfinished.open("wb", buffering=0) as file:
                for piece in chain(pieces, [memoryview(text + tail)]):
                    write_all(file.fileno(), piece)
                os.fsync(file.fileno())
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.rename(path)
        sync(self._folder)

    def retain(self, newest: StateName, *, complete: StateName | None) -> None:
        """Remove the files of the states that are not needed any more.

        Args:
            newest: the one that is being written.
            complete: the one before, if its shards are on the disks of all nodes.
        """
        states: dict[str, float] = {}
        for path in self._list():
            state = path.name[: len(str(newest))]
            states[state] = max(states.get(state, 0.0), path.stat().st_mtime)
        if complete is not None:
            kept = {str(newest), str(complete)}
        else:
            kept = {str(newest), *sorted(states, key=lambda state: states[state])[-_MOST_STATES:]}
        for path in self._list():
            if path.name[: len(str(newest))] not in kept:
                path.unlink(missing_ok=True)

    def _list(self) -> list[Path]:
        return list(self._folder.glob(f"*{_SUFFIX}"))


def _open(path: Path) -> Stored | None:
    """Map a file; None if its end is not what `write` writes."""
    descriptor = os.open(path, os.O_RDWR)  # as memory is mapped; nothing writes to it
    try:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        text_bytes = int.from_bytes(tail[:8], "big")
        num_bytes = size - _TAIL_BYTES - text_bytes
        text = os.pread(descriptor, text_bytes, num_bytes) if 0 < num_bytes < size else b""
        if not text or crc32(text) != int.from_bytes(tail[8:], "big"):
            os.close(descriptor)
            return None
        about = json.loads(text)
    except BaseException:
        os.close(descriptor)
        raise
    return Stored(name=path.stem, about=about, buffer=FileBuffer(descriptor, num_bytes))
