"""What suits the world: `single` on one rank, `fsdp2` on more. A run that shrinks to one rank changes over."""

from torch import nn

from elastic.config import RunConfig
from elastic.strategies import fsdp2, single
from elastic.strategies._base import Spread
from elastic.world import World

SHARDED_OVER = "world"


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Choose by the number of ranks; what this one needs at most is the memory of the whole state, as with FSDP2."""
    return (single if world.world_size == 1 else fsdp2).spread(model, world=world, config=config)


def get_rehearsed(config: RunConfig) -> tuple[str, ...]:
    """Name those that the worlds of this run may lead to."""
    may_be_alone, may_have_peers = config.cluster.min_workers == 1, config.cluster.max_workers > 1
    return (*(["fsdp2"] if may_have_peers else []), *(["single"] if may_be_alone else []))
