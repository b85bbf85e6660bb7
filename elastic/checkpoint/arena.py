"""Host memory that outlives the process that filled it: one rank's shard of one snapshot. No torch here.

An arena is anonymous shared memory (a memfd): it has no name in /dev/shm that a crash could leave behind, another
process holds on to it once it was sent the descriptor, and the kernel frees it with its last holder.
"""

import ctypes
import mmap
import os

from elastic.errors import CheckpointError

GIB = 2**30
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap does not name it. Source: include/uapi/asm-generic/mman-common.h."""
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Shared memory of a fixed size; free as long as nobody has written to it.

    Args:
        descriptor: a memfd of at least `num_bytes`, which belongs to the arena from here on.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        self._map = mmap.mmap(descriptor, num_bytes)
        self.view = memoryview(self._map)
        """Its bytes. What keeps a view of them keeps the memory, also beyond `close`."""

    def get_address(self) -> int:
        """Return where the first byte lies in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def populate(self, start: int, num_bytes: int) -> None:
        """Have the kernel provide the pages of a range now, without the interpreter's lock, instead of on first use.

        A kernel that cannot (before 5.14) provides them on first use, as ever.
        """
        _libc.madvise(ctypes.c_void_p(self.get_address() + start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Let go of the memory; the kernel frees it once nobody else holds it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.view = memoryview(b"")
            del self._map  # unmapped with the last view of it


def allocate_arena(num_bytes: int, *, name: str) -> Arena:
    """Return a new arena; it takes up memory only as it is written to.

    Args:
        name: shown in /proc/<pid>/maps, for whoever wonders.

    Raises:
        CheckpointError: the kernel refuses.
    """
    try:
        descriptor = os.memfd_create(f"solvent-{name}")
        os.ftruncate(descriptor, num_bytes)
        return Arena(descriptor, num_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{num_bytes / GIB:.2f} GiB of shared host memory for a snapshot were refused ({error.strerror}). Give the "
            "process more memory (container limit, ulimit -v), or set checkpoint.memory=off."
        ) from error
