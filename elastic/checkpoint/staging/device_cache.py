"""What the last snapshots have left on the device: rows that the next world need not fetch from anywhere.

A snapshot is copied within the device before it leaves. Once it has left, the memory of that copy is free, so
that the next allocation may get it; mostly there is none. Whether it still holds the snapshot, sums of its words tell.
Of two snapshots the older one is the state to fall back on until the other one is safe, so both stay where there is
room.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.checkpoint.format.sharding import ShardLayout

BLOCK_BYTES = 2**20
"""Has a sum of its own; the memory is a multiple of this long."""


@dataclass(frozen=True)
class Rows:
    """Chunks of one shard file, on the device."""

    file: str
    chunks: Mapping[str, tuple[int, Tensor]]
    """Of each tensor: where its chunk begins in the file, and the bytes of the chunk."""

    def get(self, name: str, offset: int, num_bytes: int) -> Tensor:
        """Return bytes of a chunk that is here.

        Args:
            offset: where they begin in the file.
        """
        first, chunk = self.chunks[name]
        return chunk[offset - first : offset - first + num_bytes]


class Resident:
    """Where the copy of a snapshot was made on a device, and its sums.

    Args:
        layout: of the buffer that the snapshot goes to.
        memory: bytes on the device; they are not kept, and sums are taken on the current stream.
        places: where in them each tensor's chunk begins.
    """

    def __init__(self, layout: ShardLayout, memory: Tensor, places: Mapping[str, int]) -> None:
        self.address = memory.data_ptr()
        self._layout, self._places = layout, places
        self._num_bytes, self._device = memory.numel(), memory.device
        self._sums = sum_blocks(memory)

    def find(self, file: str, *, is_alone: bool) -> Rows | None:
        """Return what is still there; None if the memory was put to another use.

        Call it on the stream on which the copy was made: memory that is free is found again by the stream that had it.
        The caller that reads the rows waits for that before letting go of them.

        Args:
            file: name of the shard file that the buffer is.
            is_alone: no other snapshot has left memory like this, which would be found as well.
        """
        try:
            memory = found = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
            if found.data_ptr() != self.address and not is_alone:  # the allocator chose the other one's
                memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None
        if not torch.equal(sum_blocks(memory), self._sums):
            return None
        chunks: dict[str, tuple[int, Tensor]] = {}
        for name, place in self._places.items():
            entry = self._layout.entries[name]
            chunks[name] = (entry.offset, memory[place : place + entry.num_bytes])
        return Rows(file, chunks)


def sum_blocks(memory: Tensor) -> Tensor:
    """Return the sum of the 64-bit words of each block; of the last one, which may be short, too."""
    words, block = memory.view(torch.int64), BLOCK_BYTES // 8
    num_whole = len(words) // block * block
    sums = words[:num_whole].view(-1, block).sum(dim=1)
    return sums if num_whole == len(words) else torch.cat([sums, words[num_whole:].sum(dim=0, keepdim=True)])
