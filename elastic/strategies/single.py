"""One rank, no communication, no copies."""

from functools import partial

from torch import nn

from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.precision import autocast
from elastic.strategies._base import Spread
from elastic.world import World

MAX_WORLD_SIZE = 1


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Leave the model whole."""
    if world.world_size != 1:
        raise ConfigError(
            f"strategy=single trains on one rank, but the world has {world.world_size}: they would not share "
            "gradients. Set strategy=fsdp2 (or ddp), or start one process."
        )
    model.to_empty(device=world.device)
    return Spread(
        module=model,
        cast=partial(autocast, config.precision, world.device),
        set_last_microbatch=lambda _is_last: None,
    )
