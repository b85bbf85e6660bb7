"""What every strategy returns: the model, spread over the ranks of a world.

A file of this folder named `<kind>.py` provides `spread(model, *, world, config) -> Spread`:

- the model comes on the meta device and leaves with memory on `world.device`, values still undefined;
- gradients are summed over ranks, never averaged: the loss has been divided by all ranks' tokens already;
- names of parameters and of optimizer state (`torch.distributed.checkpoint.state_dict`) do not change.

It may say more about its worlds with constants, literals at its top level that are read without importing it:

- ``WORLD_SIZE_MULTIPLE_OF = "<key>"``: sizes are multiples of this number of the configuration (0: any size);
- ``MAX_WORLD_SIZE = <number>``;
- ``SHARDED_OVER = "world"`` or ``"group"`` (of `shard_size` ranks): what a rank holds is its part of weights and
  moments. Without it, every rank holds all of them;
- ``CANNOT = {"<key>": (<value>, ...)}``: values of keys of the configuration that it refuses;
- ``CAN_BE_PLANNED = False``: its memory and speed were never measured, so `solvent plan` refuses it.

It may provide `get_rehearsed(config) -> tuple[str, ...]`: the kinds as which blocks run under it, for one rank that
rehearses alone. Without it, that is the kind itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from elastic import plugins
from elastic.config import OptimConfig, RunConfig
from elastic.optim.adamw import AdamW
from elastic.world import World


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How to run one microbatch, and to update what it has trained."""

    module: Callable[..., Tensor]
    """Call this one: it may wrap the model."""
    computing: nn.Module
    """Its blocks run: the model itself, or a copy of it in low precision."""
    cast: Callable[[], AbstractContextManager[object]]
    """Makes the context in which the forward runs."""
    set_last_microbatch: Callable[[bool], None]
    """Call before each microbatch's forward; what can wait is reduced over ranks only in the last one's backward."""
    build_optimizer: Callable[[OptimConfig], AdamW]
    """Makes what clips the gradients and updates the parameters; call it once these have their memory."""
    release: Callable[[], None]
    """Call after a forward that no backward follows: frees what was gathered for it."""


class Strategy(Protocol):
    """The interface of a strategy's module."""

    def spread(self, model: nn.Module, *, world: World, config: RunConfig) -> Spread:
        """Spread the model over the ranks.

        Raises:
            ConfigError: this strategy cannot use this world.
        """
        ...


def load_strategy(kind: str) -> Strategy:
    """Import the file of a strategy.

    Raises:
        ConfigError: unknown kind.
    """
    return cast(Strategy, plugins.load("elastic.strategies", kind, key="strategy"))


def get_rehearsed(config: RunConfig) -> tuple[str, ...]:
    """Return the kinds as which blocks run under the strategy of a run, for one rank that rehearses alone."""
    ask: Callable[[RunConfig], tuple[str, ...]] | None = getattr(load_strategy(config.strategy), "get_rehearsed", None)
    return ask(config) if ask else (config.strategy,)


def release_nothing() -> None:
    """Have gathered nothing."""
