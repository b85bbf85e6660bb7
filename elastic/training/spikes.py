"""Which steps are bad: pure, over recent losses that all ranks share, so that every rank judges the same.

A step is bad if its loss or gradient norm is not finite, or if its loss is a spike: over the median of the recent
losses by more than so many robust standard deviations, and by more than `MIN_RISE_NATS`. A bad step is not applied.
Samples come in a uniformly random order, so the loss of a whole batch does not jump because the text has changed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "overflow", "not_finite", "spike"]
"""`overflow`: fp16 gradients did not fit, the loss scale is lowered; part of the method, hence not bad."""

WINDOW_STEPS = 100
"""Losses that are compared with, and steps over which bad ones are counted."""
MIN_LOSSES = 20
"""With fewer losses than this nothing is called a spike."""
MIN_RISE_NATS = 3.0
"""Each token of a batch e^3 = 20 times less likely than those of the last: no warm-up and no noise does that."""
_SIGMAS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation: 1 / Phi^-1(3/4).

Source: Rousseeuw, Croux, "Alternatives to the Median Absolute Deviation", JASA 88 (1993), section 1.
"""


@dataclass(frozen=True, kw_only=True)
class Recent:
    """What the next step is judged by; saved with each checkpoint, so that a resumed run judges the same."""

    losses: Sequence[float] = ()
    """Of the newest good steps, oldest first; nats per token."""
    bad_steps: Sequence[int] = ()
    """Those among the last `WINDOW_STEPS`."""


def get_limit(losses: Sequence[float], *, threshold: float) -> float:
    """Return the loss above which a step is a spike; infinite while too little is known, or with threshold 0 (off).

    Args:
        threshold: robust standard deviations.
    """
    if threshold == 0 or len(losses) < MIN_LOSSES:
        return math.inf
    median = statistics.median(losses)
    deviation = _SIGMAS_PER_MAD * statistics.median(abs(loss - median) for loss in losses)
    return median + max(threshold * deviation, MIN_RISE_NATS)


def judge(recent: Recent, loss: float, grad_norm: float, *, threshold: float) -> Verdict:
    """Say whether the update of a step may be made."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not_finite"
    return "spike" if loss > get_limit(recent.losses, threshold=threshold) else "good"


def remember(recent: Recent, *, step: int, loss: float, verdict: Verdict) -> Recent:
    """Return what the step after this one is judged by."""
    losses, bad_steps = list(recent.losses), [bad for bad in recent.bad_steps if bad > step - WINDOW_STEPS]
    if verdict == "good":
        losses.append(loss)
    elif verdict != "overflow":
        bad_steps.append(step)
    return Recent(losses=losses[-WINDOW_STEPS:], bad_steps=bad_steps)
