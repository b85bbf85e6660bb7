"""One global batch, one update; and the same sum without the update for evaluation.

Letters: B batch, S sequence, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elastic import plugins
from elastic.config import RunConfig
from elastic.errors import StepError
from elastic.loss import IGNORE, sum_cross_entropy
from elastic.nn import init_weights
from elastic.optim import build_optimizer
from elastic.precision import build_scaler, check_precision
from elastic.recompute import set_compile, set_recompute
from elastic.strategies._base import Spread, Strategy
from elastic.world import World

_MIN_FP16_SCALE = 1.0
"""Overflow at this loss scale is no longer a matter of the scale."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an update changes, and how to run it; lives as long as its world."""

    model: nn.Module
    """Holds the parameters; state dicts are taken from this one."""
    spread: Spread
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits_BSV, labels_BS) -> summed nats."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after an update."""

    loss: float
    """Mean nats per target token over all ranks, before the update."""
    grad_norm: float
    """Before clipping."""
    target_tokens: int
    applied: bool
    """False: fp16 gradients overflowed, the update was skipped and the loss scale lowered."""
    notice: bool
    """True if any rank came with a notice."""


def build_trainable(config: RunConfig, world: World) -> Trainable:
    """Build model and optimizer on this rank's device, with the same first weights for any world.

    Raises:
        ConfigError: the device cannot do the precision, or the strategy cannot use the world.
    """
    check_precision(config.precision, world.device)
    with torch.device("meta"):
        model: nn.Module = plugins.load("elastic.models", config.model.kind, key="model.kind").build(config.model)
    for block in model.get_submodule("blocks").children():
        set_recompute(block, config.recompute)
        if config.compile:
            set_compile(block)
    strategy: Strategy = plugins.load("elastic.strategies", config.strategy, key="strategy")  # pyright: ignore[reportAssignmentType] # a module
    spread = strategy.spread(model, world=world, config=config)
    init_weights(model, seed=config.train.seed, std=config.model.init_std)
    return Trainable(
        model=model,
        spread=spread,
        optimizer=build_optimizer(model, config.optim),
        scaler=build_scaler(config.precision, world.device),
        loss=torch.compile(sum_cross_entropy) if config.compile else sum_cross_entropy,
    )


def _to_local(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train_step(
    trainable: Trainable,
    microbatches: Sequence[tuple[Tensor, Tensor]],
    *,
    lr: float,
    max_grad_norm: float,
    world: World,
    notice: bool = False,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Run forward, backward and update on one global batch.

    The loss is summed per token and divided once by the token count of all ranks, so the update is the same on
    1, 3 or 8 ranks. All decisions are taken on values that all ranks share; the host waits for the device once.

    Args:
        microbatches: this rank's (tokens_BS, labels_BS) int64 pairs, already on the device; every rank has the
            same number, and those of some may be ignored altogether.
        notice: this rank wants to leave; any rank's wish reaches all in `StepResult.notice`.
        before_update: called right before weights and optimizer state change.

    Raises:
        StepError: loss or gradient norm is not finite, on all ranks; weights and optimizer state are untouched.
    """
    optimizer, scaler = trainable.optimizer, trainable.scaler
    counts = torch.stack([(labels_BS != IGNORE).sum() for _, labels_BS in microbatches])
    target_tokens, notices = world.sum_(torch.stack([counts.sum(), counts.new_tensor(notice)])).unbind()

    optimizer.zero_grad(set_to_none=True)
    nats_sum = torch.zeros((), device=counts.device)
    for index, (tokens_BS, labels_BS) in enumerate(microbatches, start=1):
        trainable.spread.set_last_microbatch(index == len(microbatches))
        with trainable.spread.cast():
            logits_BSV = trainable.spread.module(tokens_BS)
        nats = trainable.loss(logits_BSV, labels_BS)
        scaler.scale(nats / target_tokens).backward()
        nats_sum += nats.detach()

    scaler.unscale_(optimizer)
    norm = _to_local(nn.utils.clip_grad_norm_(trainable.model.parameters(), max_grad_norm))
    shared = torch.stack([world.sum_(nats_sum) / target_tokens, norm, target_tokens, notices]).double()
    loss, grad_norm, num_tokens, num_notices = shared.tolist()

    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if not finite and not (scaler.is_enabled() and scaler.get_scale() > _MIN_FP16_SCALE):
        raise StepError(
            f"loss={loss} and gradient norm={grad_norm} over {num_tokens:.0f} target tokens: an update would destroy "
            "the weights, so none was made. Lower optim.lr, or look at the data of this step; with precision=fp16 "
            "try bf16."
        )
    if before_update is not None:
        before_update()
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # not scaler.step: fused AdamW would take its branch on the device, and we know it already
    scaler.update()
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        target_tokens=int(num_tokens),
        applied=finite,
        notice=num_notices > 0,
    )


@torch.no_grad()
def eval_loss(trainable: Trainable, batches: Iterable[tuple[Tensor, Tensor]], world: World) -> float:
    """Return the mean nats per target token over the batches of all ranks.

    Every rank brings the same number of (tokens_BS, labels_BS) pairs (FSDP2 gathers parameters in each);
    a rank that runs out brings ignored labels.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for tokens_BS, labels_BS in batches:
        with trainable.spread.cast():
            logits_BSV = trainable.spread.module(tokens_BS)
        sums[0] += trainable.loss(logits_BSV, labels_BS)
        sums[1] += (labels_BS != IGNORE).sum()
    if isinstance(trainable.model, FSDPModule):
        trainable.model.reshard()  # no backward follows that would free what the root unit gathered
    nats, tokens = world.sum_(sums).tolist()
    return nats / tokens
