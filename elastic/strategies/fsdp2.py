"""Parameters, gradients and optimizer state sharded over all ranks (ZeRO-3)."""

from torch import nn

from elastic.config import RunConfig
from elastic.strategies._base import Spread
from elastic.strategies._sharded import shard
from elastic.world import World

SHARDED_OVER = "world"


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Shard over one axis of all ranks."""
    return shard(model, world.build_mesh(shard=world.world_size), world=world, config=config)
