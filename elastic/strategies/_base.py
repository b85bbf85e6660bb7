"""What every strategy returns: the model, spread over the ranks of a world.

A file of this folder named `<kind>.py` provides `spread(model, *, world, config) -> Spread`:

- the model comes on the meta device and leaves with memory on `world.device`, values still undefined;
- gradients are summed over ranks, never averaged: the loss has been divided by all ranks' tokens already;
- names of parameters and of optimizer state (`torch.distributed.checkpoint.state_dict`) do not change.

It may limit the worlds it is given with two constants, literals at its top level that are read without importing it:

- ``WORLD_SIZE_MULTIPLE_OF = "<key>"``: sizes are multiples of this number of the configuration (0: any size);
- ``MAX_WORLD_SIZE = <number>``.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from elastic.config import RunConfig
from elastic.world import World


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How to run one microbatch."""

    module: Callable[..., Tensor]
    """Call this one: it may wrap the model."""
    computing: nn.Module
    """Its blocks run: the model itself, or a copy of it in low precision."""
    cast: Callable[[], AbstractContextManager[object]]
    """Makes the context in which the forward runs."""
    set_last_microbatch: Callable[[bool], None]
    """Call before each microbatch's forward; what can wait is reduced over ranks only in the last one's backward."""
    copies: Mapping[nn.Parameter, Tensor] = field(default_factory=dict[nn.Parameter, Tensor])
    """Copies of all parameters that compute in their place, and that every update must follow."""


class Strategy(Protocol):
    """The interface of a strategy's module."""

    def spread(self, model: nn.Module, *, world: World, config: RunConfig) -> Spread:
        """Spread the model over the ranks.

        Raises:
            ConfigError: this strategy cannot use this world.
        """
        ...
