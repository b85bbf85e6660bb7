"""From the bytes of one rank's shard to a file in a storage, and its lines in the manifest. No torch here.

The buffer is the shard file, byte for byte, in host memory: any process that maps it can write it, the one that trains
or another one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.format.manifest import BLOCK_BYTES, Chunk, FileRecord, TensorRecord
from elastic.checkpoint.format.sharding import ShardLayout, Spread
from elastic.storage import Storage

_WRITE_BYTES = 16 * 2**20
"""So much at once: a save that is given up is waited for no longer than this takes."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A shard that is durable."""

    record: FileRecord
    crc32: Mapping[str, tuple[int, ...]]
    """Per tensor, of each `manifest.BLOCK_BYTES`."""


def write_shard(
    storage: Storage,
    key: str,
    buffer: memoryview,
    layout: ShardLayout,
    *,
    check: Callable[[], None] = lambda: None,
) -> Written:
    """Checksum a buffer and write it to `key`; return when it is durable.

    Args:
        check: called before each piece; what it raises ends the write, and nothing appears.

    Raises:
        OSError: the storage's.
    """
    assert buffer.nbytes == layout.num_bytes, "a buffer is as long as its file"
    written = checksum_shard(buffer, layout)
    storage.write(key, _Pieces(buffer, check))
    return written


def checksum_shard(buffer: memoryview, layout: ShardLayout) -> Written:
    """Return the checksums of a buffer that is complete."""
    checksums = {
        name: tuple(
            crc32(buffer[start : min(start + BLOCK_BYTES, entry.offset + entry.num_bytes)])
            for start in range(entry.offset, entry.offset + entry.num_bytes, BLOCK_BYTES)
        )
        for name, entry in layout.entries.items()
    }
    record = FileRecord(
        size_bytes=layout.num_bytes,
        header_bytes=len(layout.header),
        header_crc32=crc32(buffer[: len(layout.header)]),
    )
    return Written(record=record, crc32=checksums)


def build_index(
    spreads: Mapping[str, Spread],
    layouts: Mapping[str, ShardLayout],
    checksums: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> dict[str, TensorRecord]:
    """Return where each tensor lies.

    Args:
        layouts: of each file.
        checksums: of each tensor in each file.
    """
    chunks: dict[str, list[Chunk]] = {name: [] for name in spreads}
    for file, layout in layouts.items():
        for name, entry in layout.entries.items():
            chunks[name].append(
                Chunk(
                    file=file,
                    offset=entry.offset,
                    num_bytes=entry.num_bytes,
                    start=entry.box.start,
                    shape=entry.box.shape,
                    crc32=checksums[file][name],
                )
            )
    return {
        name: TensorRecord(dtype=spread.dtype, shape=spread.shape, chunks=tuple(chunks[name]))
        for name, spread in spreads.items()
    }


class _Pieces:
    """The buffer in pieces, as often as the storage has to try."""

    def __init__(self, buffer: memoryview, check: Callable[[], None]) -> None:
        self._buffer = buffer
        self._check = check

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, self._buffer.nbytes, _WRITE_BYTES):
            self._check()
            yield self._buffer[start : start + _WRITE_BYTES]
        self._check()
