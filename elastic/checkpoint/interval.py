"""How often to save: from what a save costs and how often something is lost. Pure, and without torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SaveCost:
    """What one kind of save was measured to cost, in seconds."""

    stall_s: float
    """Time that training loses: the call itself, and what the update has to wait for."""
    busy_s: float
    """From the start of a save until the next one of its kind could begin."""


def estimate_mean_s_between_losses(*, assumed_s: float, observed_s: float, num_losses: int) -> float:
    """Return the expected seconds between two losses: what was assumed, corrected by what was seen.

    The posterior mean rate of a Poisson process whose prior is one loss in `assumed_s` seconds (a Gamma prior of shape
    1 and rate `assumed_s`), inverted: it starts at the assumption and goes to the observed mean.

    Source: Gelman et al., Bayesian Data Analysis, 3rd edition, section 2.6 (Poisson model with exposure).
    """
    return (assumed_s + observed_s) / (1 + num_losses)


def get_best_interval_s(*, cost_s: float, mean_s_between_losses: float) -> float:
    """Return the seconds of work between two saves that lose the least time to saves and to redone work together.

    Daly's higher-order estimate, which for cheap saves is Young's ``sqrt(2 * cost * mean)`` less the cost of one save.

    Source: J. W. Young, CACM 17(9), 1974; J. T. Daly, Future Generation Computer Systems 22(3), 2006, equation 37.
    """
    if cost_s >= 2 * mean_s_between_losses:
        return mean_s_between_losses
    ratio = cost_s / (2 * mean_s_between_losses)
    return math.sqrt(2 * cost_s * mean_s_between_losses) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def plan_every_steps(*, cost: SaveCost, step_s: float, mean_s_between_losses: float, longest_s: float) -> int:
    """Return after how many steps to save, at least 1.

    A save that costs training nothing would be made at every step; it still cannot begin before the one ahead of it has
    ended, which `SaveCost.busy_s` tells.

    Args:
        step_s: usual seconds of a step.
        longest_s: save at least this often, however rare losses seem to be.
    """
    best_s = get_best_interval_s(cost_s=cost.stall_s, mean_s_between_losses=mean_s_between_losses)
    return max(1, math.ceil(cost.busy_s / step_s), int(min(best_s, longest_s) / step_s))
