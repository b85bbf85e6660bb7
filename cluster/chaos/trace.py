"""A recorded fleet of spot nodes, replayed faster and smaller: change points of a trace become faults. Pure.

A trace's fleet has up to dozens of nodes, a local cluster a few. What is kept is the share of the fleet that is there:
with `n(t)` nodes of at most `n_max`, the local cluster has ``round(num_nodes * n(t) / n_max)``, but one as long as
there is one at all. A batch of losses that takes a share of the fleet takes the same share of ours, at once; single
losses of a large fleet disappear in the rounding. Which of ours goes is drawn by lot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.chaos.faults import Fault
from elastic.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TracePlan:
    """What a trace means for a local cluster."""

    initial_nodes: int
    faults: list[Fault]
    end_s: float
    """Seconds after the first step at which the trace is over."""


def plan_trace(
    levels: Sequence[tuple[float, int]], *, num_nodes: int, time_scale: float, notice_s: float, seed: int
) -> TracePlan:
    """Return the faults that let a local cluster of at most `num_nodes` follow a trace.

    Args:
        levels: as `load_trace` returns them.
        time_scale: seconds of the trace per second here.
        notice_s: warning before each loss, in seconds here; 0: none. Traces do not tell.

    Raises:
        DataError: the trace has no node at all.
    """
    most = max(count for _, count in levels)
    if not most:
        raise DataError("--trace: the fleet never has a node, so nothing could train. Give another trace.")
    start_s = next(time_s for time_s, count in levels if count)
    local = [
        ((time_s - start_s) / time_scale, _scale(count, most=most, num_nodes=num_nodes))
        for time_s, count in levels
        if time_s >= start_s
    ]
    faults: list[Fault] = []
    for (_, before), (at_s, after) in pairwise(local):
        for _ in range(before, after):
            faults.append(Fault(fault="add", at_s=at_s))
        for _ in range(after, before):
            if notice_s:
                faults.append(Fault(fault="drain", at_s=max(0.0, at_s - notice_s), notice_s=notice_s, seed=seed))
            else:
                faults.append(Fault(fault="remove", at_s=at_s, seed=seed))
    return TracePlan(initial_nodes=local[0][1], faults=faults, end_s=local[-1][0])


def _scale(count: int, *, most: int, num_nodes: int) -> int:
    return max(1, round(num_nodes * count / most)) if count else 0
