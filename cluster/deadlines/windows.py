"""A job along a stretch of recorded availability: what it costs under a policy, and when it is done. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.deadlines.policies import Held, Job, Policy, View

Levels = Sequence[tuple[float, int]]
"""(seconds, spot machines from then on), ascending."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came of it."""

    usd: float
    done_s: float
    """Seconds from the start; more than the deadline if it was missed."""
    spot_node_s: float
    on_demand_node_s: float
    changes: int

    def keeps(self, job: Job) -> bool:
        """Tell whether the deadline was kept."""
        return self.done_s <= job.deadline_s + 1e-6


def cut(levels: Levels, start_s: float, end_s: float) -> list[tuple[float, int]]:
    """Return a stretch of levels, its times from 0 on."""
    first = bisect_right(levels, (start_s, 1 << 60)) - 1
    count = levels[first][1] if first >= 0 else 0
    return [(0.0, count), *((time_s - start_s, n) for time_s, n in levels[first + 1 :] if time_s < end_s)]


def play(policy: Policy, job: Job, levels: Levels) -> Played:
    """Play a job from its start; after the last level all stays as it is.

    It decides whenever the number of spot machines changes, and every `Job.decide_every_s`.
    """
    now_s, left = 0.0, job.work_node_s
    held, since_s, ready_s = Held(), 0.0, 0.0
    spot_s = on_demand_s = 0.0
    changes = index = 0
    limit_s = 4 * job.deadline_s + 1e6
    while left > 1e-6 and now_s < limit_s:
        while index + 1 < len(levels) and levels[index + 1][0] <= now_s:
            index += 1
        spot = levels[index][1]
        if held.spot > spot:  # lost without notice: what was not saved is to be done again
            left = min(job.work_node_s, left + job.redo_s * held.total)
            held, since_s, ready_s = Held(spot=0, on_demand=held.on_demand), now_s, now_s + job.restart_s
        wanted = policy(job, View(now_s=now_s, left_node_s=left, spot=spot, held=held, since_s=since_s))
        if wanted != held:
            held, since_s, ready_s = wanted, now_s, now_s + job.restart_s
            changes += 1
        next_s = now_s + job.decide_every_s
        if index + 1 < len(levels):
            next_s = min(next_s, levels[index + 1][0])
        rate = held.total if held.total >= job.min_nodes else 0
        if rate:
            done_s = max(now_s, ready_s) + left / rate
            next_s = min(next_s, done_s)
            left -= max(0.0, next_s - max(now_s, ready_s)) * rate
        spot_s += held.spot * (next_s - now_s)
        on_demand_s += held.on_demand * (next_s - now_s)
        now_s = next_s
    usd = (spot_s * job.spot_usd_per_hour + on_demand_s * job.on_demand_usd_per_hour) / 3600
    return Played(usd=usd, done_s=now_s, spot_node_s=spot_s, on_demand_node_s=on_demand_s, changes=changes)
