"""Blocks of remote shards on a node's disk: one file that never grows beyond what was configured.

A block has a place in one of 8 slots, which its key decides; a new block takes an empty slot of these or turns one out
at random. Processes and runs on a node share the file without a lock: a slot has the key and the checksum of what was
written there last, and what does not agree with both, because two wrote at once or a machine went down, is no hit. A
disk that is full or fails makes every look-up a miss, and nothing else.
"""

import logging
import os
import random
import struct
from pathlib import Path

from zlib_ng.zlib_ng import crc32

log = logging.getLogger(__name__)

_SLOTS = 8
_ENTRY = struct.Struct("<QII")  # key, checksum, bytes
_NO_KEY = 0


class BlockCache:
    """See the top of this file.

    Args:
        folder: made if it is not there.
        max_bytes: of the blocks; what tells them apart takes a four-thousandth more.
        block_bytes: the longest block.
    """

    def __init__(self, folder: Path, *, max_bytes: int, block_bytes: int) -> None:
        self.num_hits = self.num_misses = 0
        self._block_bytes = block_bytes
        self._num_sets = max(1, max_bytes // (_SLOTS * block_bytes))
        self._file: int | None = None
        self._data_at = self._num_sets * _SLOTS * _ENTRY.size
        if max_bytes < _SLOTS * block_bytes:
            return
        name = f"blocks-{self._num_sets}x{block_bytes}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, self._data_at + self._num_sets * _SLOTS * block_bytes)  # takes no space yet
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file; what is in it stays for the next process."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def get(self, key: int) -> bytes | None:
        """Return a block as it was put; None if it is not there, or not whole."""
        if self._file is None:
            return None
        try:
            first = key % self._num_sets * _SLOTS
            entries = os.pread(self._file, _SLOTS * _ENTRY.size, first * _ENTRY.size)
            for slot, (found, checksum, size) in enumerate(_ENTRY.iter_unpack(entries)):
                if found == key:
                    data = os.pread(self._file, size, self._find(first + slot))
                    if len(data) == size and crc32(data) == checksum:
                        self.num_hits += 1
                        return data
        except (OSError, struct.error) as error:
            self._give_up(error)
        self.num_misses += 1
        return None

    def put(self, key: int, data: bytes) -> None:
        """Keep a block, if the disk can."""
        if self._file is None:
            return
        try:
            first = key % self._num_sets * _SLOTS
            entries = os.pread(self._file, _SLOTS * _ENTRY.size, first * _ENTRY.size)
            keys = [found for found, _, _ in _ENTRY.iter_unpack(entries)]
            wanted = [slot for slot, found in enumerate(keys) if found in (key, _NO_KEY)]
            slot = first + (wanted[0] if wanted else random.randrange(_SLOTS))
            os.pwrite(self._file, _ENTRY.pack(_NO_KEY, 0, 0), slot * _ENTRY.size)
            if os.pwrite(self._file, data, self._find(slot)) == len(data):
                os.pwrite(self._file, _ENTRY.pack(key, crc32(data), len(data)), slot * _ENTRY.size)
        except (OSError, struct.error) as error:
            self._give_up(error)

    def _find(self, slot: int) -> int:
        return self._data_at + slot * self._block_bytes

    def _give_up(self, error: Exception) -> None:
        log.warning("data.cache cannot be used (%s): training reads all data from the store", error)
        self.close()
