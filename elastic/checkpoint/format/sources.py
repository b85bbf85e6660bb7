"""Where the bytes of shards come from when a state is put together again. No torch here.

A source has some of a checkpoint's files, byte for byte as they were written: a storage has them all, a node's memory
those that were saved there. Whatever a source gives is verified; what does not fit is taken from the next.
"""

import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.format.read_plan import Block, Read
from elastic.storage import Storage

_DAMAGE = frozenset({errno.ENOENT, errno.ENODATA, errno.EIO})
"""The file is gone, too short or unreadable. Other errors are the storage's, and no older checkpoint would help."""


class ShardSource(Protocol):
    """Has shard files of one checkpoint."""

    @property
    def name(self) -> str:
        """Say in a word what it is, for a message."""
        ...

    def get_files(self) -> Collection[str] | None:
        """Return the names of the files it has; None: all."""
        ...

    def get_view(self, file: str, offset: int, num_bytes: int) -> memoryview | None:
        """Return bytes of a file where they are, if this process has them in its memory; they stay what they are."""
        ...

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from `offset`; threads call it side by side.

        Raises:
            OSError: it cannot; ENOENT, ENODATA and EIO mean that the file is damaged.
        """
        ...


@dataclass(frozen=True)
class StorageSource:
    """A checkpoint's directory in a storage."""

    storage: Storage
    directory: str

    @property
    def name(self) -> str:
        """Return the storage's URL."""
        return self.storage.url

    def get_files(self) -> None:
        """Return None: it has all of them."""

    def get_view(self, file: str, offset: int, num_bytes: int) -> None:
        """Return None: it must be read."""

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Read from the storage."""
        self.storage.read_into(f"{self.directory}/{file}", offset, out)


class DamageError(Exception):
    """What was read is not what was written; the message names file and tensor."""


def read_verified(
    read: Read, sources: Sequence[ShardSource], get_buffer: Callable[[], memoryview], *, in_buffer: bool = False
) -> memoryview:
    """Return the blocks of a read from the first source that has them undamaged: where they are, or in a buffer.

    Args:
        get_buffer: returns at least as much memory as the read is long; the same one each time.
        in_buffer: in the buffer in any case.

    Raises:
        DamageError: no source has them.
        OSError: a source cannot be read for a reason that is not damage of this file.
    """
    damage: list[str] = []
    for source in sources:
        files = source.get_files()
        if files is not None and read.file not in files:
            continue
        try:
            view = source.get_view(read.file, read.offset, read.num_bytes)
            found = get_buffer()[: read.num_bytes] if view is None or in_buffer else view
            if view is None:
                source.read_into(read.file, read.offset, found)
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            damage.append(f"{read.file} ({_list_names(read.blocks)}): {error.strerror or error}")
            continue
        if view is not None and in_buffer:
            _copy(view, found)
        if (expected := read.crc32) is None or crc32(found) == expected:
            return found
        broken = [block for block in read.blocks if crc32(_cut(read, block, found)) != block.crc32]
        damage.append(f"{read.file} ({_list_names(broken)}): the checksum does not fit")
    raise DamageError("; ".join(damage) or f"{read.file} is nowhere")


def _cut(read: Read, block: Block, data: memoryview) -> memoryview:
    start = block.offset - read.offset
    return data[start : start + block.num_bytes]


def _copy(source: memoryview, target: memoryview) -> None:
    """Copy bytes without the interpreter's lock, which assigning to a memoryview keeps."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _list_names(blocks: Sequence[Block]) -> str:
    names = list(dict.fromkeys(block.name for block in blocks))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
