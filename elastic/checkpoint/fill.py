"""Bring the bytes that a rank needs from where they are into its live tensors, many reads side by side.

What lies in the memory of this process is verified where it is and copied from there; what must be read goes through
one small buffer per thread. To a GPU everything goes from page-locked memory, each thread on a stream of its own.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from elastic.checkpoint.reads import Read
from elastic.checkpoint.sources import DamageError, ShardSource, read_verified
from elastic.checkpoint.state import DTYPES

READ_BYTES = 16 * 2**20
"""Length of a buffer."""
NUM_READERS = 4
"""Reads side by side on each rank, each with a buffer: one stream of an object store gives 50 to 100 MB/s."""
NUM_COPIERS = max(NUM_READERS, min(8, os.cpu_count() or 1))
"""The same from memory, where checksums and copies take cores and nobody waits for a network. For 16.75 GiB and an H100
eight took 1.1 s, sixteen on as many cores 1.4 s: they wait for each other's turn with the interpreter."""


def fill(
    targets: Mapping[str, Tensor],
    reads: Sequence[Read],
    sources: Sequence[ShardSource],
    *,
    device: torch.device,
    num_readers: int = NUM_READERS,
) -> str | None:
    """Read, verify and copy; return what is damaged. All is there when this returns.

    Args:
        targets: on `device` or on the host; each lies in a row.

    Raises:
        OSError: a source cannot be read for a reason that is not damage.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in targets.items():
        assert tensor.is_contiguous(), f"{name} does not lie in a row"
        flat[name] = tensor.detach().view(-1)
    lanes = _Lanes(max((read.num_bytes for read in reads), default=0), device)

    def bring(read: Read) -> str | None:
        try:
            data = read_verified(read, sources, lanes.get_buffer)
        except DamageError as error:
            return str(error)
        lanes.copy(data, read, flat)
        return None

    with ThreadPoolExecutor(num_readers, thread_name_prefix="restore") as pool:
        return next((damage for damage in pool.map(bring, reads) if damage), None)


class _Lanes(threading.local):
    """What each thread works with; made anew in each, and the buffer only where one is needed."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._is_cuda = device.type == "cuda"
        self._buffer: Tensor | None = None
        if self._is_cuda:
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)
            # what the thread that builds the model has begun to write into the targets
            self._stream.wait_stream(torch.cuda.default_stream(device))

    def get_buffer(self) -> memoryview:
        """Return the thread's own memory; page-locked if it goes to a GPU."""
        if self._buffer is None:
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        return self._buffer.numpy().data

    def copy(self, data: memoryview, read: Read, flat: Mapping[str, Tensor]) -> None:
        """Copy the pieces of a read to their places; return when they are there."""
        if not self._is_cuda:
            _copy(data, read, flat)
            return
        buffer = self.get_buffer()[: len(data)]
        found, place = (torch.frombuffer(view, dtype=torch.uint8) for view in (data, buffer))
        if found.data_ptr() != place.data_ptr():  # an arena, which is not page-locked
            place.copy_(found)
        with torch.cuda.stream(self._stream):
            _copy(buffer, read, flat)
        self._stream.synchronize()


def _copy(data: memoryview, read: Read, flat: Mapping[str, Tensor]) -> None:
    for piece in read.pieces:
        found = torch.frombuffer(data, dtype=DTYPES[piece.dtype], count=piece.num_elements, offset=piece.start)
        flat[piece.name][piece.target : piece.target + piece.num_elements].copy_(found, non_blocking=True)
