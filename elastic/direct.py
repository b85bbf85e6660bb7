"""Write and read large data without a copy in the kernel's page cache. No torch here.

Nobody reads a checkpoint soon after it was written, nor twice. Its copy in the cache costs as much memory as the state,
and more time of a core than all else of a save: 54 MB took 120 ms of it in memory that was new to a virtual machine,
and take 5 ms without (O_DIRECT).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import threading

READ_PIECE_BYTES = 4 * 2**20
"""Each thread that reads needs as much memory beside what it fills."""
_ALIGNED_BYTES = 4096
"""Address, place in the file and length of what is written directly: no disk or file system asks for more."""
_WORTH_BYTES = 2**20
"""What is smaller goes through the cache: a direct write returns only once the disk has it."""
_REFUSALS = (errno.EINVAL, errno.ENOTSUP)
"""What a file system says that cannot do it."""


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> int:
    """Write all of `data` at the end of what was written, and return its length; `fsync` makes it durable, as always.

    Args:
        descriptor: of a file that only this thread writes, from its start.

    Raises:
        OSError: the disk is full, or does not work.
    """
    rest = memoryview(data).cast("B")
    num_bytes = len(rest)
    offset = os.lseek(descriptor, 0, os.SEEK_CUR)
    while rest:
        done = _write_directly(descriptor, rest, offset) or os.write(descriptor, rest)
        rest, offset = rest[done:], offset + done
    return num_bytes


def _write_directly(descriptor: int, data: memoryview, offset: int) -> int:
    """Write what can be written directly, and return how much that was: 0 if the file system refuses."""
    num_bytes = _count_direct(data, offset)
    if not num_bytes:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.write(descriptor, data[:num_bytes])
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return 0
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


class _Own(threading.local):
    """Of a thread: memory that begins where a page does."""

    def __init__(self) -> None:
        self.memory: memoryview | None = None

    def get(self, num_bytes: int) -> memoryview:
        """Return so much of it."""
        if self.memory is None or len(self.memory) < num_bytes:
            self.memory = memoryview(mmap.mmap(-1, num_bytes))
        return self.memory[:num_bytes]


_own = _Own()


def read_into(descriptor: int, offset: int, out: memoryview) -> int:
    """Fill `out` with the bytes of a file from `offset`; return how many there were.

    What is read directly goes through memory of the thread's own: hardly any data begin where a disk's blocks do.

    Raises:
        OSError: the disk does not work.
    """
    out = out.cast("B")
    done = _read_directly(descriptor, offset, out)
    while done < len(out):
        num_bytes = os.preadv(descriptor, [out[done:]], offset + done)
        if not num_bytes:
            break
        done += num_bytes
    return done


def _read_directly(descriptor: int, offset: int, out: memoryview) -> int:
    """Read as much as can be read directly: nothing if it is little, or if the file system refuses."""
    if len(out) < _WORTH_BYTES:
        return 0
    done, flags = 0, fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < len(out):
            num_bytes = _read_piece(descriptor, offset + done, out[done : done + READ_PIECE_BYTES])
            if not num_bytes:
                break
            done += num_bytes
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _read_piece(descriptor: int, offset: int, out: memoryview) -> int:
    start = offset - offset % _ALIGNED_BYTES
    size = offset - start + len(out)
    memory = _own.get(size + -size % _ALIGNED_BYTES)
    found = memory[: os.preadv(descriptor, [memory], start)][offset - start :][: len(out)]
    if found:
        to, of = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (out, found))
        ctypes.memmove(to, of, len(found))  # without the interpreter's lock
    return len(found)


def _count_direct(data: memoryview, offset: int) -> int:
    """Return how much of the data, from its start, can be written directly."""
    whole_bytes = len(data) - len(data) % _ALIGNED_BYTES
    if whole_bytes < _WORTH_BYTES or offset % _ALIGNED_BYTES or data.readonly:
        return 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return 0 if address % _ALIGNED_BYTES else whole_bytes
