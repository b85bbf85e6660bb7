"""One rank's view of one world: its place, its device and the one sum that training needs.

A world lives from `open_world` to `close_world`; a change of size is a new world under a new attempt number.
The store belongs to whoever formed the world: torchrun, or the trainer that Solvent's coordinator made rank 0.
"""

import gc
import logging
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

# torch.distributed re-exports its stores without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elastic.breaker import Presence, abort_all, connecting_group, let_in, let_nobody_in
from elastic.errors import ConfigError
from elastic.ports import WorldSpec

logger = logging.getLogger(__name__)


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
    presence: Presence = field(repr=False, compare=False)
    meshes: list[DeviceMesh] = field(default_factory=list[DeviceMesh], repr=False, compare=False)
    """Those built here, so that `close_world` can take their groups away."""

    def build_mesh(self, **axes: int) -> DeviceMesh:
        """Arrange all ranks along named axes, the last one varying fastest; every rank must call it."""
        with connecting_group() as close_doors:
            mesh = init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
            if dist.get_backend() == "gloo":
                close_doors()
        self.meshes.append(mesh)
        return mesh

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place and return it; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def open_store(ip: str, *, timeout_s: float) -> dist.TCPStore:
    """Serve a store on a free port of this address, and of no other, for a world that may choose it."""
    return _serve_store(ip, socket.create_server((ip, 0)), timeout_s=timeout_s)


def _serve_store(ip: str, listener: socket.socket, *, timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(
        ip,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store owns the socket from here on
    )


class OwnStore:
    """As `open_store`, for a process that is in one world after the other, with a door that it opens and closes.

    It is served by threads of torch's, which stop to accept anybody once enough strangers have called: two thousand
    silent ones were enough, and the next world waited for it in vain. So its door is open only while a world forms.
    """

    def __init__(self, ip: str, *, timeout_s: float) -> None:
        listener = socket.create_server((ip, 0))
        self._door = listener.dup()
        self.store = _serve_store(ip, listener, timeout_s=timeout_s)
        self.close_door()

    def close(self) -> None:
        """Let go of the door; the store ends with its last user."""
        self._door.close()

    def open_door(self) -> None:
        """Let the ranks of the next world in."""
        let_in(self._door)

    def close_door(self) -> None:
        """Let nobody in who is not there; the connections that stand are left alone."""
        let_nobody_in(self._door)


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
    presence: Presence | None = None,
) -> World:
    """Join the process group of one attempt; returns once all its ranks are here.

    A single rank opens a group as well: FSDP2 and distributed checkpoints need one.

    Args:
        timeout_s: the longest wait for the store, for the other ranks and later for any collective.
        store: use this instead of connecting to the TCPStore at `spec.store_host:spec.store_port`.
        presence: from `Breaker.arm`; None: nobody will break this world.
    """
    timeout = timedelta(seconds=timeout_s)
    rank_device = get_device(device, local_rank=spec.local_rank)
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
    # Groups are numbered by a count that every rank must share, and only the end of a world sets it back; a world that
    # did not form has counted here and not there, and the next one would wait under another name than its peers.
    dist.distributed_c10d._world.group_count = 0  # pyright: ignore[reportPrivateUsage] # no public way to name them
    with connecting_group() as close_doors:
        if store is None:
            store = dist.TCPStore(spec.store_host, spec.store_port, is_master=False, timeout=timeout)
        # A prefix per attempt: keys that a dead world left behind must never be read by the next one.
        store = dist.PrefixStore(f"attempt-{spec.attempt}", store)
        backend = _choose_backend(store, _get_gpu(rank_device), rank=spec.rank, world_size=spec.world_size)
        dist.init_process_group(
            backend,
            store=store,
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timeout,
            # NCCL sets up its communicator now and not in the first step; one rank may never need it, and to abort it
            # takes most of a second
            device_id=rank_device if rank_device.type == "cuda" and spec.world_size > 1 else None,
        )
        if backend == "gloo":
            close_doors()
    return World(
        rank=spec.rank,
        world_size=spec.world_size,
        local_rank=spec.local_rank,
        local_world_size=spec.local_world_size,
        attempt=spec.attempt,
        node=spec.node,
        device=rank_device,
        presence=presence or Presence(rank_device),
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
        abort_all()
    else:
        dist.destroy_process_group()
