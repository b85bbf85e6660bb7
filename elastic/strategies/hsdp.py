"""Sharded within a group of ranks (a node, by default), replicated between groups."""

from torch import nn

from elastic.config import RunConfig
from elastic.strategies._base import Spread
from elastic.strategies._sharded import shard
from elastic.world import World

WORLD_SIZE_MULTIPLE_OF = "shard_size"
SHARDED_OVER = "group"


def get_shard_size(wanted: int, world_size: int) -> int:
    """Return the largest divisor of the world size that is at most `wanted`, so that any world works."""
    return next(size for size in range(min(wanted, world_size), 0, -1) if world_size % size == 0)


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Shard over groups of `shard_size` ranks (those of one node, by default)."""
    shard_size = get_shard_size(config.shard_size or world.local_world_size, world.world_size)
    mesh = world.build_mesh(replicate=world.world_size // shard_size, shard=shard_size)
    return shard(model, mesh, world=world, config=config)


def get_rehearsed(config: RunConfig) -> tuple[str, ...]:  # noqa: ARG001 (the signature of all strategies)
    """A block that FSDP2 has gathered is the same on any mesh."""
    return ("fsdp2",)
