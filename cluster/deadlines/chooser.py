"""Which policy, before the job starts: all of them are played on the recent past, and the cheapest is taken. Pure."""

import math
from collections.abc import Mapping
from statistics import fmean

from cluster.deadlines.policies import POLICIES, Job, Policy
from cluster.deadlines.windows import Levels, cut, play

_MOST_PLAYS = 4
DEFAULT = "elastic-steady"
"""Where nothing is known of the past: the cheapest on average over the public traces."""
_CLEARLY = 0.9
"""Another one must have cost less than this share of it: the next hours are seldom like the last ones."""


def choose_policy(job: Job, past: Levels, *, past_s: float, policies: Mapping[str, Policy] = POLICIES) -> str:
    """Return the name of the policy that would have cost least in the past.

    Args:
        past: availability before now, its times from 0 to `past_s`.
    """
    if past_s <= 0 or not past:
        return DEFAULT
    length_s = min(job.deadline_s, past_s)
    num_plays = max(1, min(_MOST_PLAYS, int(2 * past_s / length_s)))
    starts_s = [(past_s - length_s) * n / max(1, num_plays - 1) for n in range(num_plays)]
    stretches = [_repeat(cut(past, start_s, start_s + length_s), length_s, job.deadline_s) for start_s in starts_s]
    costs = {name: fmean(play(policy, job, levels).usd for levels in stretches) for name, policy in policies.items()}
    best = min(costs, key=lambda name: costs[name])
    return best if costs[best] < _CLEARLY * costs.get(DEFAULT, math.inf) else DEFAULT


def _repeat(levels: Levels, length_s: float, until_s: float) -> list[tuple[float, int]]:
    """Return a stretch again and again until it is long enough."""
    repeated: list[tuple[float, int]] = []
    start_s = 0.0
    while start_s < until_s:
        repeated += [(start_s + time_s, count) for time_s, count in levels]
        start_s += length_s
    return repeated
