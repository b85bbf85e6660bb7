"""Host memory that outlives the process that filled it: one rank's shard of one snapshot. No torch here.

A buffer is anonymous shared memory (a memfd): it has no name in /dev/shm that a crash could leave behind, another
process holds on to it once it was sent the descriptor, and the kernel frees it with its last holder.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from elastic import direct
from elastic.errors import CheckpointError
from elastic.processes import be_nice

logger = logging.getLogger(__name__)

GIB = 2**30
_POPULATE_BYTES = 8 * 2**20
"""So much at a time: a thread that maps other memory meanwhile waits for no more (milliseconds)."""
_POPULATE_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14. Source: madvise(2)."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class SharedBuffer:
    """Shared memory of a fixed size; it takes up no memory until it is written to.

    Args:
        descriptor: a memfd of at least `num_bytes`, which belongs to the buffer from here on.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        try:
            self._map = mmap.mmap(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        self.view = memoryview(self._map)
        """Its bytes. What keeps a view of them keeps the memory, also beyond `close`."""
        self.is_found = False
        """The kernel has found all of its memory."""

    def populate(self) -> threading.Thread:
        """Have the kernel find the memory before it is written to, which then goes faster; return the thread that does.

        It is no error if the kernel cannot. Once the buffer is closed no more is found.
        """
        try:
            descriptor = os.dup(self.descriptor)  # the number may soon be another file's
        except OSError:  # it is closed
            descriptor = -1
        thread = threading.Thread(target=self._populate, args=(descriptor, self.view), name="populate", daemon=True)
        thread.start()
        return thread

    def _populate(self, descriptor: int, view: memoryview) -> None:
        starts = range(0, len(view), _POPULATE_BYTES)
        try:
            with ThreadPoolExecutor(_POPULATE_THREADS, "populate", initializer=be_nice) as pool:
                list(pool.map(partial(self._find, descriptor, view), starts))
            self.is_found = self.descriptor >= 0
        except OSError as error:
            logger.info("memory for a snapshot is found as it is filled, not before: %s", error)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _find(self, descriptor: int, view: memoryview, start: int) -> None:
        """Have memory found and mapped, by several threads at once, which a file's memory could not be."""
        if self.descriptor < 0:
            return
        part = view[start : start + _POPULATE_BYTES]
        address = ctypes.addressof(ctypes.c_char.from_buffer(part))
        if not _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(part)), _MADV_POPULATE_WRITE):
            return
        if (number := ctypes.get_errno()) != errno.EINVAL:  # what an older kernel says
            raise OSError(number, os.strerror(number))
        os.posix_fallocate(descriptor, start, len(part))

    def read_into(self, offset: int, out: memoryview) -> None:
        """Copy bytes to `out` without mapping the pages that they lie in, which takes longer than to copy them once.

        Raises:
            OSError: ENODATA, it is shorter.
        """
        done = 0
        while done < len(out):
            num_bytes = os.preadv(self.descriptor, [out[done:]], offset + done)
            if not num_bytes:
                raise OSError(errno.ENODATA, "the memory ends before the shard")
            done += num_bytes

    def close(self) -> None:
        """Let go of the memory; the kernel frees it with its last holder, which takes a second for 10 GiB."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.view = memoryview(b"")
            del self._map  # unmapped with the last view of it


class FileBuffer(SharedBuffer):
    """The same bytes in a file, which are read past the kernel's cache: nobody reads them twice.

    Through the cache a GiB took 0.2 s more of a core, on a virtual machine to which its memory was new 1.8 s.
    """

    def read_into(self, offset: int, out: memoryview) -> None:
        """Read from the disk.

        Raises:
            OSError: ENODATA, it is shorter; EIO, the disk does not give it.
        """
        # opened anew: how a file is read belongs to what was opened, which several threads and processes share
        descriptor = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY)
        try:
            num_bytes = direct.read_into(descriptor, offset, out)
        finally:
            os.close(descriptor)
        if num_bytes < len(out):
            raise OSError(errno.ENODATA, "the file ends before the shard")


def allocate_buffer(num_bytes: int, *, name: str) -> SharedBuffer:
    """Return a new buffer; it takes up memory only as it is written to.

    Args:
        name: shown in /proc/<pid>/maps, for people who look there.

    Raises:
        CheckpointError: the kernel refuses.
    """
    try:
        descriptor = os.memfd_create(f"solvent-{name}")
        try:
            os.ftruncate(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return SharedBuffer(descriptor, num_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{num_bytes / GIB:.2f} GiB of shared host memory for a snapshot were refused ({error}). Give the "
            "process more memory (container limit, ulimit -v), or set checkpoint.memory=off."
        ) from error
