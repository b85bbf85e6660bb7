"""One rank's view of one world: its place, its device and the one sum that training needs.

A world lives from `open_world` to `close_world`; a change of size is a new world under a new attempt number.
The store belongs to whoever formed the world: torchrun, or the trainer that Solvent's coordinator made rank 0.
"""

import gc
import logging
import os
import socket
import struct
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic, sleep
from typing import Literal

# torch.distributed re-exports its stores without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elastic.errors import ConfigError
from elastic.ports import WorldSpec

logger = logging.getLogger(__name__)

_STILL_S = 0.02
"""So long without a byte means that no message is under way: a thread on a busy machine goes on sooner."""
_STILL_PATIENCE_S = 0.5
_TCP_INFO_BYTES = 136
"""Up to and with `tcpi_bytes_acked` and `tcpi_bytes_received` in Linux' `struct tcp_info` (since 4.1)."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A rank's place in an open process group; all ranks are data-parallel."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    attempt: int
    node: str
    device: torch.device
    meshes: list[DeviceMesh] = field(default_factory=list[DeviceMesh], repr=False, compare=False)
    """Those built here, so that `close_world` can take their groups away."""

    def build_mesh(self, **axes: int) -> DeviceMesh:
        """Arrange all ranks along named axes, the last one varying fastest; every rank must call it."""
        mesh = init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        self.meshes.append(mesh)
        return mesh

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place and return it; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """Take the minimum of a tensor over all ranks in place and return it; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor


class Breaker:
    """Lets another thread end one world at once: what waits for a peer, dead or not, fails within milliseconds.

    Without it a collective with a peer that sends no FIN lasts until its time-out. gloo has no call for this (abort and
    destroy leave a collective under way alone), so the connections that this process opened for the world are shut
    down beneath it; NCCL has one. While a message is half received they must not be: gloo tells no one who waits for
    such a message that its connection is gone (its `Pair::signalException` skips it), and the wait would last until its
    time-out. So a world is broken when no byte has moved for a moment. A message that has begun ends without any help
    from the threads that train, and those stop at their next step, or hang on a peer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: frozenset[tuple[int, int]] | None = None
        self._has_nccl = False
        self.is_broken = False
        """The world was ended; whatever fails in it failed for that reason."""

    def arm(self, device: torch.device) -> None:
        """Begin the world: connections that are open already belong to something else.

        Raises:
            DistError: it was ended before it began.
        """
        with self._lock:
            if self.is_broken:
                raise dist.DistError("the world was given up before it began")
            self._before = frozenset(_list_sockets())
            self._has_nccl = device.type == "cuda"

    def disarm(self) -> None:
        """Leave the world; nothing is left to break."""
        with self._lock:
            self._before = None

    def break_world(self) -> None:
        """End the world, or do not let it begin; from any thread but the one that trains."""
        with self._lock:
            self.is_broken = True
        self._wait_until_still()
        with self._lock:
            if self._before is None:
                return
            for descriptor, inode in _list_sockets():
                if (descriptor, inode) not in self._before:
                    _shut_down(descriptor, inode)
            if self._has_nccl and dist.is_initialized():
                _abort_all()

    def _wait_until_still(self) -> None:
        """Wait until no message is under way, but not for long: a frozen peer may never take the rest of one."""
        deadline_s = monotonic() + _STILL_PATIENCE_S
        moved, still_since_s = -1, monotonic()
        while (before := self._before) is not None and (now_s := monotonic()) < deadline_s:
            last, moved = moved, sum(_count_moved_bytes(*each) for each in _list_sockets() if each not in before)
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


def _count_moved_bytes(descriptor: int, inode: int) -> int:
    """Return how many bytes a connection's peer has acknowledged and has sent; other sockets have none."""
    with suppress(OSError, struct.error), _borrow_connection(descriptor, inode) as connection:  # an older kernel
        if connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            return sum(struct.unpack_from("=QQ", info, _TCP_INFO_BYTES - 16))
    return 0


def _abort_all() -> None:
    # Private, but the only call that aborts all communicators in one NCCL group (pytorch issue 119797).
    dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage] # no public equivalent


def open_store(ip: str, *, timeout_s: float) -> dist.TCPStore:
    """Serve a store on a free port of this address, and of no other, for a world that may choose it."""
    listener = socket.create_server((ip, 0))
    return dist.TCPStore(
        ip,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store owns the socket from here on
    )


def get_device(choice: Literal["auto", "cpu", "cuda"], *, local_rank: int) -> torch.device:
    """Return the device of one rank.

    The index wraps, because a launcher may show all GPUs of the node to each rank or only the rank's own.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={choice} but torch {torch.__version__} sees no CUDA device on this node. "
            "Set device=cpu, or install a CUDA build of torch and check `nvidia-smi`."
        )
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def open_world(
    spec: WorldSpec,
    *,
    device: Literal["auto", "cpu", "cuda"],
    timeout_s: float,
    store: dist.Store | None = None,
) -> World:
    """Join the process group of one attempt; returns once all its ranks are here.

    A single rank opens a group as well: FSDP2 and distributed checkpoints need one.

    Args:
        timeout_s: the longest wait for the store, for the other ranks and later for any collective.
        store: use this instead of connecting to the TCPStore at `spec.store_host:spec.store_port`.
    """
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store = dist.TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout)
    rank_device = get_device(device, local_rank=spec.local_rank)
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
    # Groups are numbered by a count that every rank must share, and only the end of a world sets it back; a world that
    # did not form has counted here and not there, and the next one would wait under another name than its peers.
    dist.distributed_c10d._world.group_count = 0  # pyright: ignore[reportPrivateUsage] # no public way to name them
    # A prefix per attempt: keys that a dead world left behind must never be read by the next one.
    store = dist.PrefixStore(f"attempt-{spec.attempt}", store)
    dist.init_process_group(
        _choose_backend(store, _get_gpu(rank_device), rank=spec.rank, world_size=spec.world_size),
        store=store,
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timeout,
        # NCCL sets up its communicator now and not in the first step; one rank may never need it, and to abort it takes
        # most of a second
        device_id=rank_device if rank_device.type == "cuda" and spec.world_size > 1 else None,
    )
    return World(
        rank=spec.rank,
        world_size=spec.world_size,
        local_rank=spec.local_rank,
        local_world_size=spec.local_world_size,
        attempt=spec.attempt,
        node=spec.node,
        device=rank_device,
    )


def _get_gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _choose_backend(store: dist.Store, gpu: str, *, rank: int, world_size: int) -> str:
    """Return NCCL for GPUs, and gloo for CPUs or if two ranks share a GPU, which NCCL refuses; the same on all ranks.

    gloo takes all that the ranks say to each other through host memory: right for trying things out, and slow.

    Args:
        gpu: this rank's, by a name that no other one has; empty: the ranks train on CPUs.
    """
    if not gpu:
        return "gloo"
    if world_size == 1:
        return "nccl"
    store.set(f"gpu-{rank}", gpu)
    num_gpus = len(set(store.multi_get([f"gpu-{other}" for other in range(world_size)])))  # waits for all
    if num_gpus == world_size:
        return "nccl"
    if rank == 0:
        logger.warning("%d ranks share %d GPU(s): they talk through host memory, which is slow", world_size, num_gpus)
    return "gloo"


def close_world(world: World, *, peers: Literal["alive", "lost"] = "alive") -> None:
    """Leave the process group, so that peers that still wait for this rank fail at once and a new world can open.

    The caller drops model and optimizer first. gloo closes its connections only when the last reference to a group
    is gone: FSDP2 modules sit in reference cycles, hence the collection, and DTensor's caches keep meshes for the
    life of the process, hence the emptied registries.

    Args:
        peers: with "lost", NCCL communicators are aborted; their orderly end would wait for the dead peer.
    """
    gc.collect()
    for mesh in world.meshes:
        getattr(mesh, "_pg_registry", {}).clear()  # private; absent before a mesh held groups itself
    world.meshes.clear()
    if not dist.is_initialized():  # a `Breaker` was faster
        return
    if world.device.type == "cuda" and peers == "lost":
        _abort_all()
    else:
        dist.destroy_process_group()
