"""One global batch, one update; and the same sum without the update for evaluation.

Letters: B batch, S sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from elastic import plugins
from elastic.config import RunConfig
from elastic.nn.attention import choose_attention, set_attention
from elastic.nn.layers import init_weights
from elastic.nn.lora import add_adapters
from elastic.nn.loss import IGNORE, Microbatch
from elastic.nn.precision import build_scaler, check_precision, get_dtype, set_tf32
from elastic.nn.recompute import set_budget, set_compile, set_offload, set_recompute
from elastic.optim.adamw import AdamW
from elastic.strategies._base import Spread, load_strategy
from elastic.training.interrupt import GIVE_UP, URGENCY, Decision, agree
from elastic.training.spikes import Recent, Verdict, judge
from elastic.tuning import find_in_4_bits
from elastic.world import World

_MIN_FP16_SCALE = 1.0
"""Overflow at this loss scale is no longer a matter of the scale."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an update changes, and how to run it; lives as long as its world."""

    model: nn.Module
    """Holds the parameters; state dicts are taken from this one."""
    spread: Spread
    optimizer: AdamW
    scaler: GradScaler


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float
    """Mean nats per target token over all ranks, before the update."""
    grad_norm: float
    """Before clipping."""
    target_tokens: int
    verdict: Verdict
    """The update was made only if this is `good`."""
    decision: Decision
    """What all ranks do after this step; of those in `GIVE_UP` only `leave_now` still counts by then."""


@dataclass(frozen=True, kw_only=True)
class Abandoned:
    """A step that all ranks gave up before its update, because a node has no time to finish it."""

    decision: Decision
    """One of `GIVE_UP`."""


def is_finite(loss: float, grad_norm: float) -> Verdict:
    """Judge a step by itself alone."""
    return judge(Recent(), loss, grad_norm, threshold=0)


def want_nothing(when: Literal["start", "end"]) -> Decision:  # noqa: ARG001 (the signature of all wishes)
    """Have no notice."""
    return "continue"


def build_trainable(
    config: RunConfig, world: World, *, first_weights: Literal["random", "undefined"] = "random"
) -> Trainable:
    """Build model and optimizer on this rank's device.

    Args:
        first_weights: random ones are the same for any world; undefined ones are to be overwritten.

    Raises:
        ConfigError: the device cannot do the precision, or the strategy cannot use the world.
    """
    check_precision(config.precision, world.device)
    set_tf32(config.precision)
    set_budget(config.recompute_budget if config.recompute == "budget" else 1.0)
    with torch.device("meta"):
        model: nn.Module = plugins.load("elastic.models", config.model.kind, key="model.kind").build(config.model)
    if config.tune != "full":
        targets, in_4_bits = config.lora.find_targets(config.model), find_in_4_bits(config.model, config.tune)
        add_adapters(model, targets, config.lora, dtype=get_dtype(config.precision), in_4_bits=in_4_bits)
    spread = load_strategy(config.strategy).spread(model, world=world, config=config)
    set_attention(spread.computing, choose_attention(config, world.device))
    for block in spread.computing.get_submodule("blocks").children():
        set_recompute(block, config.recompute)
        if config.compile:
            set_compile(block)
        if config.recompute == "offload":
            set_offload(block)
    if first_weights == "random":
        init_weights(model, seed=config.train.seed, std=config.model.init_std)
    return Trainable(
        model=model,
        spread=spread,
        optimizer=spread.build_optimizer(config.optim),
        scaler=build_scaler(config.precision, world.device),
    )


def train_step(
    trainable: Trainable,
    microbatches: Sequence[Microbatch],
    *,
    lr: float,
    max_grad_norm: float,
    world: World,
    get_wish: Callable[[Literal["start", "end"]], Decision] = want_nothing,
    judge_step: Callable[[float, float], Verdict] = is_finite,
    before_update: Callable[[], None] | None = None,
) -> StepResult | Abandoned:
    """Run forward, backward and update on one global batch.

    The loss is summed per token and divided once by the token count of all ranks, so the update is the same on
    1, 3 or 8 ranks. All decisions are taken on values that all ranks share. The wishes of all ranks ride in the sum
    of target tokens; the host reads it when the device has the first forward to work on, so the device never waits.

    Args:
        microbatches: this rank's, already on the device; every rank has the same number, and the labels of some may
            be ignored altogether.
        get_wish: what this rank wants all to do, asked before the first forward and again after the last backward.
        judge_step: (loss, gradient norm) -> whether the update may be made; must answer alike on all ranks.
        before_update: called right before weights and optimizer state change.

    Returns:
        The result; `Abandoned` if a rank wished at the start that the step is not finished: nothing has changed.

    Raises:
        DistError: a collective of this step was aborted on some rank; nothing has changed.
    """
    optimizer, scaler = trainable.optimizer, trainable.scaler
    num_targets = torch.stack([(labels_BS != IGNORE).sum() for _, labels_BS, *_ in microbatches]).sum()
    counts = world.sum_(torch.cat([num_targets.view(1), _to_vote(get_wish("start"), like=num_targets)]))
    target_tokens, read_votes = counts[0], _start_reading(counts[1:])

    optimizer.zero_grad(set_to_none=True)
    nats_sum = torch.zeros((), device=counts.device)
    for index, microbatch in enumerate(microbatches, start=1):
        trainable.spread.set_last_microbatch(index == len(microbatches))
        with trainable.spread.cast():
            nats = trainable.spread.module(*microbatch)
        if index == 1 and (decision := agree(read_votes())) in GIVE_UP:
            trainable.spread.release()
            return Abandoned(decision=decision)
        scaler.scale(nats / target_tokens).backward()
        nats_sum += nats.detach()

    scaler.unscale_(optimizer)
    norm = optimizer.clip(max_grad_norm)
    nats = nats_sum.double().view(1)
    sums = world.sum_(torch.cat([nats, world.presence.read(), _to_vote(get_wish("end"), like=nats)]))
    shared = torch.stack([sums[0] / target_tokens, norm.double(), target_tokens.double()])
    loss, grad_norm, num_tokens, presence, *votes = _start_reading(torch.cat([shared, sums[1:]]))()
    world.presence.check(presence, world_size=world.world_size)  # the last collective of a step speaks for all before

    verdict = judge_step(loss, grad_norm)
    if verdict == "not_finite" and scaler.is_enabled() and scaler.get_scale() > _MIN_FP16_SCALE:
        verdict = "overflow"
    if before_update is not None:
        before_update()
    if verdict == "good":
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # not scaler.step: fused AdamW would take its branch on the device, and we know it already
    scaler.update()
    return StepResult(
        loss=loss, grad_norm=grad_norm, target_tokens=int(num_tokens), verdict=verdict, decision=agree(votes)
    )


def _to_vote(wish: Decision, *, like: Tensor) -> Tensor:
    """Return one 1 at the place of the wish in `URGENCY`; built on the device, because a copy to it would wait."""
    vote = like.new_zeros(len(URGENCY))
    if wish != "continue":
        vote[URGENCY.index(wish)] = 1
    return vote


def _start_reading(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy values to the host; the returned function waits for this copy and for no later work.

    A copy to memory that is not page-locked waits within the driver, which then keeps all other threads of the process
    from starting copies: for most of a step no piece of a snapshot left the device.
    """
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


@torch.no_grad()
def eval_loss(trainable: Trainable, batches: Iterable[Microbatch], world: World) -> float:
    """Return the mean nats per target token over the batches of all ranks.

    Every rank brings the same number of them (FSDP2 gathers parameters in each); a rank that runs out brings ignored
    labels.

    Raises:
        DistError: a collective was aborted on some rank.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        with trainable.spread.cast():
            sums[0] += trainable.spread.module(*batch)
        sums[1] += (batch[1] != IGNORE).sum()
    trainable.spread.release()
    nats, tokens, presence = _start_reading(world.sum_(torch.cat([sums, world.presence.read()])))()
    world.presence.check(presence, world_size=world.world_size)
    return nats / tokens
