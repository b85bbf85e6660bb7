"""A prepared folder in an object store: shards are read by range, in blocks that are verified, kept and read ahead.

Where tokens lie in a shard is said in `dataset.json`, or found from a shard's first and last bytes if an older version
prepared it. Blocks have checksums of their own (`blocks.crc32`), so that a part of a shard can be trusted without the
rest; data of older versions has none, and is trusted as the store delivers it.
"""

import errno
import hashlib
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from elastic.data.prepared.block_cache import BlockCache
from elastic.data.prepared.format import (
    BLOCK_BYTES,
    BLOCK_SUMS_FILE,
    DatasetInfo,
    Layout,
    Shard,
    Tokens,
    count_blocks,
    find_layout,
    unpack_bits,
)
from elastic.errors import DataError
from elastic.storage import Storage

log = logging.getLogger(__name__)

_REQUESTS_AT_ONCE = 16
_MAX_AHEAD = 4096
"""Blocks in memory that were read ahead: 256 MiB."""
_ENDS_BYTES = 1 << 16
_PART_BYTES = 8 << 20
"""Of a shard that is read whole."""
_PATIENCE_S = 900.0
"""So long an outage of the store is waited for, beyond the tries of the storage itself."""
_TRIES = 3
"""Of a block whose bytes are not those that were prepared: a proxy or a disk on the way may have been wrong once."""


class RemoteFolder:
    """See `elastic.data.prepared.folder.Folder`."""

    def __init__(self, storage: Storage, info: DatasetInfo, cache: BlockCache | None) -> None:
        self.num_bytes_fetched = 0
        self._storage, self._cache = storage, cache
        self._has_sums = info.has_block_sums
        self._first_sums: dict[str, int] = {}
        num_blocks = 0
        for shard in (*info.train.shards, *info.val.shards):
            self._first_sums[shard.file] = num_blocks
            num_blocks += count_blocks(shard)
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._get_layout = lru_cache(None)(self._find_layout)
        self._get_sums = lru_cache(None)(self._read_sums)
        self._get_row_offsets = lru_cache(None)(self._read_row_offsets)

    def __str__(self) -> str:
        return self._storage.url

    def read_file(self, name: str) -> bytes:
        """See the Protocol."""
        return self._storage.read(name)

    def read_tokens(self, shard: Shard, start: int, count: int) -> Tokens:
        """See the Protocol."""
        layout = self._get_layout(shard)
        kind = np.uint16 if layout.token_bytes == np.dtype(np.uint16).itemsize else np.uint32
        begin = layout.tokens_at + start * layout.token_bytes
        return np.frombuffer(self._read(shard, begin, begin + count * layout.token_bytes), kind)

    def read_row_offsets(self, shard: Shard) -> npt.NDArray[np.int32]:
        """See the Protocol."""
        return self._get_row_offsets(shard)

    def read_counted(self, shard: Shard, start: int, count: int) -> npt.NDArray[np.bool_] | None:
        """See the Protocol."""
        at = self._get_layout(shard).counted_at
        if at is None:
            return None
        bits = self._read(shard, at + start // 8, at + (start + count + 7) // 8)
        return unpack_bits(np.frombuffer(bits, np.uint8), start % 8, count)

    @contextmanager
    def borrow(self, shard: Shard) -> Generator[Path]:
        """Copy the file to this machine, and remove it in the end."""
        with tempfile.TemporaryDirectory(prefix="solvent-shard-") as folder:
            path = Path(folder) / shard.file
            with path.open("wb") as file:
                for start in range(0, shard.size_bytes, _PART_BYTES):
                    out = bytearray(min(_PART_BYTES, shard.size_bytes - start))
                    self._read_into(shard.file, start, memoryview(out))
                    file.write(out)
            yield path

    def read_ahead(self, shard: Shard, start: int, count: int) -> None:
        """Begin to read what `read_tokens` and `read_counted` will be asked for; they wait for it."""
        layout = self._get_layout(shard)
        begin = layout.tokens_at + start * layout.token_bytes
        blocks = [*_list_blocks(begin, begin + count * layout.token_bytes)]
        if layout.counted_at is not None:
            blocks += _list_blocks(layout.counted_at + start // 8, layout.counted_at + (start + count + 7) // 8)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="read-ahead")
            for block in blocks:
                key = (shard.file, block)
                if key not in self._ahead:
                    self._ahead[key] = self._pool.submit(self._get_block, shard, block)
                self._ahead.move_to_end(key)
            while len(self._ahead) > _MAX_AHEAD:
                self._ahead.popitem(last=False)[1].cancel()

    def stop_reading_ahead(self) -> None:
        """End the threads; what was read ahead is forgotten, but for what the cache has."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._ahead.clear()
        if pool:
            pool.shutdown(cancel_futures=True)

    def _read(self, shard: Shard, begin: int, end: int) -> bytes:
        """Return bytes of a shard's file."""
        blocks = _list_blocks(begin, end)
        parts = [self._take(shard, block) for block in blocks]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return whole[begin - blocks[0] * BLOCK_BYTES : end - blocks[0] * BLOCK_BYTES]

    def _take(self, shard: Shard, block: int) -> bytes:
        with self._lock:
            future = self._ahead.get((shard.file, block))
        if future and not future.cancelled():
            return future.result()
        return self._get_block(shard, block)

    def _get_block(self, shard: Shard, block: int) -> bytes:
        """Return a verified block, from the cache or from the store."""
        wanted = int(self._get_sums(shard)[block]) if self._has_sums else None
        digest = hashlib.blake2b(f"{shard.sha256}/{block}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little") or 1
        data = self._cache.get(key) if self._cache else None
        if data is not None and wanted in (None, crc32(data)):
            return data
        data = self._fetch(shard, block, wanted)
        if self._cache:
            self._cache.put(key, data)
        return data

    def _fetch(self, shard: Shard, block: int, wanted: int | None) -> bytes:
        begin = block * BLOCK_BYTES
        out = bytearray(min(BLOCK_BYTES, shard.size_bytes - begin))
        for _ in range(_TRIES):
            self._read_into(shard.file, begin, memoryview(out))
            if wanted in (None, crc32(out)):
                return bytes(out)
        raise DataError(
            f"{self}/{shard.file} is corrupt at byte {begin:,}: the checksum of the block there is not what "
            f"{BLOCK_SUMS_FILE} says. Training on it would spoil the model. Copy the folder to the store again."
        )

    def _read_into(self, name: str, start: int, out: memoryview) -> None:
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._storage.read_into(name, start, out)
                self.num_bytes_fetched += len(out)
                return
            except FileNotFoundError as error:
                raise DataError(f"{self}/{name} is missing, dataset.json lists it. Copy the folder again.") from error
            except OSError as error:
                if error.errno == errno.ENODATA:
                    raise DataError(
                        f"{self}/{name} ends too early: a copy was cut short. Copy the folder again."
                    ) from error
                if error.errno in (errno.EACCES, errno.EINVAL) or time.monotonic() > end_s:
                    raise DataError(f"{self}/{name} cannot be read ({error.strerror}).") from error
                log.warning("%s/%s cannot be read (%s); training waits for it", self, name, error.strerror)

    def _read_sums(self, shard: Shard) -> npt.NDArray[np.uint32]:
        out = bytearray(4 * count_blocks(shard))
        self._read_into(BLOCK_SUMS_FILE, 4 * self._first_sums[shard.file], memoryview(out))
        return np.frombuffer(out, "<u4")

    def _read_row_offsets(self, shard: Shard) -> npt.NDArray[np.int32]:
        layout = self._get_layout(shard)
        return np.frombuffer(
            self._read(shard, layout.offsets_at, layout.offsets_at + 4 * (layout.num_rows + 1)), np.int32
        )

    def _find_layout(self, shard: Shard) -> Layout:
        """Return where things lie; Arrow's own reader says so of a file that has holes where the content would be."""
        if shard.layout:
            return shard.layout
        tail = max(0, shard.size_bytes - _ENDS_BYTES)
        with tempfile.NamedTemporaryFile(prefix="solvent-shard-") as file:
            for begin in {0, tail}:
                end = min(begin + _ENDS_BYTES, shard.size_bytes)
                os.pwrite(file.fileno(), self._read(shard, begin, end), begin)
            return find_layout(Path(file.name))


def _list_blocks(begin: int, end: int) -> range:
    return range(begin // BLOCK_BYTES, max(begin // BLOCK_BYTES + 1, -(-end // BLOCK_BYTES)))
