"""Where a prepared folder lies, behind one Protocol: the rest of `elastic.data` reads tokens by shard and range."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from elastic.data.prepared.format import MappedShard, Shard, Tokens, map_shard, unpack_bits


class Folder(Protocol):
    """A prepared folder; its name is what `str` makes of it. Threads may share it."""

    def read_file(self, name: str) -> bytes:
        """Return all of a small file.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        ...

    def read_tokens(self, shard: Shard, start: int, count: int) -> Tokens:
        """Return tokens of one shard's stream."""
        ...

    def read_row_offsets(self, shard: Shard) -> npt.NDArray[np.int32]:
        """Return where each row (a document, or a part of one) begins in a shard, and its tokens' number at the end."""
        ...

    def read_counted(self, shard: Shard, start: int, count: int) -> npt.NDArray[np.bool_] | None:
        """Tell of tokens whether they count for the loss; None: all do."""
        ...

    def borrow(self, shard: Shard) -> AbstractContextManager[Path]:
        """Return the path of a shard's file on this machine, of the same name; in a `with` block it stays there.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def read_ahead(self, shard: Shard, start: int, count: int) -> None:
        """Take note that these tokens will be read soon."""
        ...

    def stop_reading_ahead(self) -> None:
        """End the threads of `read_ahead`, if there are any."""
        ...


class LocalFolder:
    """A folder on a file system. A shard is mapped when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, MappedShard] = {}

    def __str__(self) -> str:
        return str(self.path)

    def read_file(self, name: str) -> bytes:
        """See the Protocol."""
        return (self.path / name).read_bytes()

    def read_tokens(self, shard: Shard, start: int, count: int) -> Tokens:
        """Return a view, not a copy."""
        return self._map(shard).tokens[start : start + count]

    def read_row_offsets(self, shard: Shard) -> npt.NDArray[np.int32]:
        """Return a view, not a copy."""
        return self._map(shard).row_offsets

    def read_counted(self, shard: Shard, start: int, count: int) -> npt.NDArray[np.bool_] | None:
        """See the Protocol."""
        bits = self._map(shard).counted_bits
        return None if bits is None else unpack_bits(bits, start, count)

    def borrow(self, shard: Shard) -> AbstractContextManager[Path]:
        """See the Protocol; the file may not be there."""
        return nullcontext(self.path / shard.file)

    def read_ahead(self, shard: Shard, start: int, count: int) -> None:
        """Do nothing: the kernel reads ahead."""

    def stop_reading_ahead(self) -> None:
        """Do nothing."""

    def _map(self, shard: Shard) -> MappedShard:
        mapped = self._mapped.get(shard.file)
        if mapped is None:
            mapped = self._mapped[shard.file] = map_shard(self.path / shard.file)
        return mapped
