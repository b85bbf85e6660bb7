"""Host memory of a node: its processes, and the snapshots that they hold. Pure.

The planner, the size of pods and `solvent doctor` count snapshots by this.
"""

from dataclasses import dataclass

from cluster.planner.memory import get_element_bytes
from cluster.planner.shape import get_block_shape
from elastic.checkpoint.durable.storage_errors import estimate_checkpoint_bytes
from elastic.checkpoint.staging.host_memory import MOST_BUFFERS, NUM_COPIES
from elastic.config import RunConfig

GIB = 2**30
_STAGED = 2
"""Without snapshots in memory: those on their way to the storage."""
# Estimates, not measured: what a process with torch and CUDA holds of host memory, and the rest of a node.
TRAINER_GIB, SPARE_GIB, NODE_GIB = 6.0, 3.0, 4.0
"""A spare trainer has opened its device and loaded compiled code, and holds no state."""


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """What the memory of a node holds of a run's state, if there is room."""

    num_ranks: int
    """Of the node."""
    shard_bytes: int
    num_buffers: int
    """Of each rank, for its own shard."""
    num_copies: int
    """For as many shards of another node."""

    @property
    def num_shards(self) -> int:
        """For each rank of the node."""
        return self.num_buffers + self.num_copies

    @property
    def num_bytes(self) -> int:
        """Of all ranks of the node."""
        return self.num_ranks * self.num_shards * self.shard_bytes


def estimate_shard_bytes(config: RunConfig, world_size: int) -> int:
    """Return what one rank saves: every byte of the state is in one shard once, whatever the strategy."""
    return estimate_checkpoint_bytes(config.num_trained_params) // world_size


def plan_snapshots(config: RunConfig, *, world_size: int, ranks_per_node: int) -> Snapshots:
    """Return the snapshots that the memory tier takes where it may take all that it wants."""
    num_ranks = min(ranks_per_node, world_size)
    is_kept = config.checkpoint.memory != "off"
    has_peers = config.checkpoint.memory == "peer" and world_size > num_ranks
    return Snapshots(
        num_ranks=num_ranks,
        shard_bytes=estimate_shard_bytes(config, world_size),
        num_buffers=MOST_BUFFERS if is_kept else _STAGED,
        num_copies=NUM_COPIES if has_peers else 0,
    )


def estimate_host_gib(config: RunConfig, *, world_size: int, gpus_per_node: int) -> float:
    """Return the host memory that the processes and snapshots of a node take, GPUs holding the state itself."""
    snapshots = plan_snapshots(config, world_size=world_size, ranks_per_node=gpus_per_node)
    spare_gib = SPARE_GIB if config.compile and config.cluster.spare_trainers else 0.0
    trainer_gib = TRAINER_GIB + spare_gib + _count_offloaded_bytes(config) / GIB
    return NODE_GIB + gpus_per_node * trainer_gib + snapshots.num_bytes / GIB


def _count_offloaded_bytes(config: RunConfig) -> int:
    """Return what recompute=offload puts there: the input of each block, for one microbatch."""
    if config.recompute != "offload":
        return 0
    tokens = config.train.micro_batch * config.data.seq_len
    return config.model.num_layers * tokens * get_block_shape(config.model).dim * get_element_bytes(config)
