"""How another thread ends a world at once, and how nothing that this has spoiled is ever believed.

What waits for a peer, dead or not, fails within milliseconds. NCCL ends such collectives without an error, with the
rank's own numbers in place, so each sum that counts is taken together with a sum of the ranks that were there.
"""

import ctypes
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from time import monotonic, sleep

# torch.distributed re-exports its parts without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist
from torch import Tensor

from elastic.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_STILL_S = 0.02
"""So long without a byte means that no message is under way: a thread on a busy machine goes on sooner."""
_STILL_PATIENCE_S = 0.5
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_BPF_RETURN = 0x06
"""Source: Linux, include/uapi/asm-generic/socket.h and include/uapi/linux/filter.h (BPF_RET | BPF_K)."""
_TCP_INFO_BYTES = 136
"""Up to and with `tcpi_bytes_acked` and `tcpi_bytes_received` in Linux' `struct tcp_info` (since 4.1)."""


class Presence:
    """What a rank adds to a sum over all ranks to show that it has not given its world up.

    After an abort NCCL's collectives end without an error. In place is then what the rank itself brought, or that and
    what a peer had sent in a collective before (both seen on two H200): a loss and gradients that look like any others.
    So what all ranks are to believe is summed together with the number of the turn, which no sum before had, and counts
    only if the total is that of all ranks. A rank that gives up adds zero. It does so before its first communicator is
    aborted, and on a GPU the number is read when the stream gets there, after everything that an abort could have
    spoiled: its peers cannot take such a step for a good one either, although they may still reach it through a
    communicator that is aborted later.

    Args:
        device: where the sums are made.
        num_ranks: how many it speaks for; all of a fake group, which sums nothing.
    """

    def __init__(self, device: torch.device, *, num_ranks: int = 1) -> None:
        self._turn = 0
        self._is_revoked = False
        self._number = self._seen = torch.full((1,), float(num_ranks))
        if device.type == "cuda":
            with torch.cuda.device(device):  # what is page-locked belongs to the current one
                self._number = self._number.pin_memory()
                self._seen = _map(self._number, device)

    def revoke(self) -> None:
        """Add nothing from now on; from any thread."""
        self._is_revoked = True
        self._number.zero_()

    def read(self) -> Tensor:
        """Return this rank's number of the next turn: one fp64 element on the device of the sums."""
        self._turn += 1
        return self._seen.double() * self._turn

    def check(self, total: float, *, world_size: int) -> None:
        """Refuse what was summed over all ranks if some rank had given the world up.

        Args:
            total: the sum over all ranks of what each has read last.

        Raises:
            DistError: nothing that was summed with it, or before it, may be used.
        """
        if self._is_revoked or total != world_size * self._turn:
            raise dist.DistError(
                "a collective of the world was aborted: "
                + ("this rank gave it up" if self._is_revoked else f"not all of its {world_size} ranks took part")
            )


class _MappedNumbers:
    """Tells torch of page-locked host memory as the device addresses it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": "<f4",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def _map(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device that shares memory with one in page-locked host memory.

    A kernel reads it when it runs. A copy from the host would not do: the driver takes a few bytes along when the copy
    is asked for (seen on an H200 with CUDA 13).
    """
    mapped = torch.as_tensor(_MappedNumbers(host), device=device)
    assert mapped.data_ptr() == host.data_ptr(), "torch has made a copy: the memory belongs to another device"
    return mapped


class _GroupSockets:
    """Which sockets of this process belong to process groups: those that appeared while one was connected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[tuple[int, int]] = set()
        self._before: frozenset[tuple[int, int]] | None = None

    @contextmanager
    def connecting(self) -> Generator[Callable[[], None]]:
        with self._lock:
            self._before = before = frozenset(_list_sockets())

        def close_doors() -> None:
            for descriptor, inode in set(_list_sockets()) - before:
                _close_door(descriptor, inode)

        try:
            yield close_doors
        finally:
            with self._lock:
                self._known |= set(_list_sockets()) - before
                self._before = None

    def list_open(self) -> list[tuple[int, int]]:
        """Return descriptor and inode of those that are open, those of a group under way included."""
        with self._lock:
            known, before = set(self._known), self._before
        return [each for each in _list_sockets() if each in known or (before is not None and each not in before)]

    def forget(self) -> None:
        """Start anew: a group that is gone has no sockets."""
        with self._lock:
            self._known.clear()


_group_sockets = _GroupSockets()
"""Of the process, as torch's default group is."""


def connecting_group() -> AbstractContextManager[Callable[[], None]]:
    """Make a context in which the world's training thread connects a process group, so that a `Breaker` can break it.

    gloo connects all ranks at once, and returns when that is done. What the context yields is to be called then, of
    gloo only: it lets nobody else in.
    """
    return _group_sockets.connecting()


class Breaker:
    """Lets another thread end one world at once: what waits for a peer, dead or not, fails within milliseconds.

    Without it a collective with a peer that sends no FIN lasts until its time-out. NCCL has a call for this. gloo has
    none (abort and destroy leave a collective under way alone), so the connections of the world's groups are shut down
    beneath it, and no others: an upload goes on. While a message is half received they must not be: gloo tells no one
    who waits for such a message that its connection is gone (its `Pair::signalException` skips it), and the wait would
    last until its time-out. So a world is broken when no byte has moved for a moment. A message that has begun ends
    without any help from the threads that train, and those stop at their next step, or hang on a peer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._presence: Presence | None = None
        self._has_nccl = False
        self.is_broken = False
        """The world was ended; whatever fails in it failed for that reason."""

    def arm(self, device: torch.device) -> Presence:
        """Begin the world; return what this rank proves with that it has not been ended.

        Raises:
            DistError: it was ended before it began.
        """
        with self._lock:
            if self.is_broken:
                raise dist.DistError("the world was given up before it began")
            self._presence = Presence(device)
            self._has_nccl = device.type == "cuda"
            _group_sockets.forget()
            return self._presence

    def disarm(self) -> None:
        """Leave the world; nothing is left to break."""
        with self._lock:
            self._presence = None

    def break_world(self) -> None:
        """End the world, or do not let it begin; from any thread but the one that trains."""
        with self._lock:
            self.is_broken = True
            if self._presence is not None:
                self._presence.revoke()  # before anything is aborted
        stopwatch = Stopwatch()
        self._wait_until_still()
        stopwatch.lap("still")
        with self._lock:
            if self._presence is None:
                return
            for descriptor, inode in _group_sockets.list_open():
                _shut_down(descriptor, inode)
            stopwatch.lap("gloo")
            if self._has_nccl and dist.is_initialized():
                abort_all()
                stopwatch.lap("NCCL")
            logger.info("world broken: %s", stopwatch)

    def _wait_until_still(self) -> None:
        """Wait until no message is under way, but not for long: a frozen peer may never take the rest of one."""
        deadline_s = monotonic() + _STILL_PATIENCE_S
        moved, still_since_s = -1, monotonic()
        while self._presence is not None and (now_s := monotonic()) < deadline_s:
            last, moved = moved, sum(_count_moved_bytes(*each) for each in _group_sockets.list_open())
            if moved != last:
                still_since_s = now_s
            elif now_s - still_since_s >= _STILL_S:
                return
            sleep(_STILL_S / 4)


def _list_sockets() -> list[tuple[int, int]]:
    """Return descriptor and inode of each socket of this process."""
    found: list[tuple[int, int]] = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (names are all we want)
        with suppress(OSError):  # closed meanwhile
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115 (it points to no path)
            if target.startswith("socket:["):
                found.append((int(name), int(target[8:-1])))
    return found


@contextmanager
def _borrow_connection(descriptor: int, inode: int) -> Generator[socket.socket | None]:
    """Lend a socket if it is a TCP connection, and not closed meanwhile with its number used again."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        is_same = os.fstat(connection.fileno()).st_ino == inode
        is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        is_listening = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        yield connection if is_same and is_internet and not is_listening else None


def _shut_down(descriptor: int, inode: int) -> None:
    """Shut a connection down; a listening socket is left alone, since gloo aborts the process if its own fails."""
    with suppress(OSError), _borrow_connection(descriptor, inode) as connection:
        if connection:
            connection.shutdown(socket.SHUT_RDWR)


def _close_door(descriptor: int, inode: int) -> None:
    """Let nobody in where a group of gloo's listens.

    gloo goes on listening once all ranks are there, and keeps whatever else connects until its group ends: two thousand
    that say nothing took two thousand descriptors of each group. Closed or shut down, it would abort the process.
    """
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as listener:
        is_same = os.fstat(listener.fileno()).st_ino == inode
        is_internet = listener.family in (socket.AF_INET, socket.AF_INET6)
        if is_same and is_internet and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            let_nobody_in(listener)


def let_nobody_in(listener: socket.socket) -> None:
    """Have the kernel drop what comes to a listening socket; the connections that it has accepted are left alone."""
    rule = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN, 0, 0, 0))  # take no byte of anything
    program = struct.pack("@HP", 1, ctypes.addressof(rule))
    with suppress(OSError):  # a sandbox may know no filters
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def let_in(listener: socket.socket) -> None:
    """Undo `let_nobody_in`."""
    with suppress(OSError):  # it has no filter
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _count_moved_bytes(descriptor: int, inode: int) -> int:
    """Return how many bytes a connection's peer has acknowledged and has sent; other sockets have none."""
    with suppress(OSError, struct.error), _borrow_connection(descriptor, inode) as connection:  # an older kernel
        if connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            return sum(struct.unpack_from("=QQ", info, _TCP_INFO_BYTES - 16))
    return 0


def abort_all() -> None:
    """Abort all NCCL communicators of this process."""
    # Private, but the only call that aborts all communicators in one NCCL group (pytorch issue 119797).
    dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage] # no public equivalent
