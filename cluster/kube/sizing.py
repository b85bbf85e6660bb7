"""How many nodes, and how much host memory each needs: a pod that exceeds its limit is killed without notice.

Checkpoints live in host memory before they reach storage, in memfds that count against the pod's limit like any memory,
but not against the size of /dev/shm. How many a node holds, and of what size, `cluster/planner/host_memory.py` says.
"""

import math
from dataclasses import dataclass

from cluster.kube.options import Options
from cluster.planner.host_memory import NODE_GIB, TRAINER_GIB, estimate_host_gib
from cluster.planner.memory import estimate_memory
from elastic.config import RunConfig
from elastic.errors import ConfigError

_CPUS_FOR_RAY = 2
OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing of ours goes through Ray's object store; 75 MiB is the least that Ray takes."""
_SHM_BASE_MIB = 512
"""The object store, and room for its growth."""
_SHM_MIB_PER_WORKER = 512
"""NCCL's and torch's segments between the processes of a node; an estimate."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a worker pod asks for, and how many there may be."""

    uses_gpus: bool
    workers_per_node: int
    least_nodes: int
    """That hold cluster.min_workers."""
    most_nodes: int
    """That hold cluster.max_workers."""
    cpus: int
    memory_gib: int
    shm_mib: int
    """Size limit of /dev/shm."""


def plan_sizes(config: RunConfig, options: Options) -> Sizes:
    """Return the sizes for this run.

    Raises:
        ConfigError: the options do not fit the run.
    """
    cluster = config.cluster
    if options.gpus_per_node > 1 and not cluster.gpus_per_worker:
        raise ConfigError(
            f"--set gpus_per_node={options.gpus_per_node}, but cluster.gpus_per_worker=0: the GPUs would be paid for "
            "and idle. Set cluster.gpus_per_worker=1, or leave gpus_per_node out."
        )
    workers = options.gpus_per_node if cluster.gpus_per_worker else 1
    shm_mib = _SHM_BASE_MIB + _SHM_MIB_PER_WORKER * workers
    cpus = workers * max(cluster.cpus_per_worker, cluster.threads_per_worker) + _CPUS_FOR_RAY
    memory_gib = options.memory_gib_per_node or estimate_memory_gib(config, workers) + math.ceil(shm_mib / 1024)
    if options.cpus_per_node and options.cpus_per_node < workers * cluster.cpus_per_worker:
        raise ConfigError(
            f"--set cpus_per_node={options.cpus_per_node} is less than the {workers} worker(s) of a node need with "
            f"cluster.cpus_per_worker={cluster.cpus_per_worker}, so nothing fits there. Set cpus_per_node={cpus}."
        )
    if memory_gib * 1024 <= shm_mib:
        raise ConfigError(
            f"--set memory_gib_per_node={memory_gib} leaves nothing beside {shm_mib} MiB of /dev/shm. Leave it out, or "
            f"set memory_gib_per_node={math.ceil(NODE_GIB + workers * TRAINER_GIB)}."
        )
    return Sizes(
        uses_gpus=bool(cluster.gpus_per_worker),
        workers_per_node=workers,
        least_nodes=math.ceil(cluster.min_workers / workers),
        most_nodes=math.ceil(cluster.max_workers / workers),
        cpus=options.cpus_per_node or cpus,
        memory_gib=memory_gib,
        shm_mib=shm_mib,
    )


def estimate_memory_gib(config: RunConfig, workers_per_node: int) -> int:
    """Return the host memory that the processes and snapshots of a node may take, in the worst world allowed.

    That is mostly the smallest, but one that has just outgrown a node holds copies as well.
    """
    return math.ceil(max(_estimate_gib(config, size, workers_per_node) for size in config.get_world_sizes()))


def _estimate_gib(config: RunConfig, world_size: int, workers_per_node: int) -> float:
    gib = estimate_host_gib(config, world_size=world_size, gpus_per_node=workers_per_node)
    if config.cluster.gpus_per_worker:
        return gib
    held = estimate_memory(config, world_size=world_size, gpus_per_node=workers_per_node)  # here instead of on a GPU
    return gib + min(workers_per_node, world_size) * held.peak_gib
