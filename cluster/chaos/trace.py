"""A recorded fleet of spot nodes, replayed faster and smaller: change points of a trace become faults. Pure.

Two formats are read: `t_s,event,node` (event: add or remove) and `t_s,nodes` (the last row is the end).

A trace's fleet has up to dozens of nodes, a local cluster a few. What is kept is the share of the fleet that is there:
with `n(t)` nodes of at most `n_max`, the local cluster has ``round(num_nodes * n(t) / n_max)``, but one as long as
there is one at all. A batch of losses that takes a share of the fleet takes the same share of ours, at once; single
losses of a large fleet disappear in the rounding. Which of ours goes is drawn by lot.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cluster.chaos.faults import Fault
from elastic.errors import DataError

_NAMED, _COUNTED = ["t_s", "event", "node"], ["t_s", "nodes"]


@dataclass(frozen=True, kw_only=True)
class TracePlan:
    """What a trace means for a local cluster."""

    initial_nodes: int
    faults: list[Fault]
    end_s: float
    """Seconds after the first step at which the trace is over."""


def load_trace(path: Path) -> list[tuple[float, int]]:
    """Read a trace as (seconds, nodes from then on), in order, one row per moment.

    Raises:
        DataError: it cannot be read, or is in neither format.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--trace {path} cannot be read ({error}). Give the path of a CSV file.") from error
    header = rows[0] if rows else []
    if header not in (_NAMED, _COUNTED) or len(rows) < 2:
        raise DataError(
            f"--trace {path} begins with {','.join(header)!r}, not with a trace's columns. Give a CSV file with the "
            f"columns {','.join(_NAMED)} or {','.join(_COUNTED)}, and rows."
        )
    levels: dict[float, int] = {}
    there: set[str] = set()
    last_s = 0.0
    for number, row in enumerate(rows[1:], start=2):
        try:
            time_s = float(row[0])
            if time_s < last_s:
                raise ValueError(f"the time goes back from {last_s:g}")
            if header == _COUNTED:
                levels[time_s] = int(row[1])
            else:
                {"add": there.add, "remove": there.discard}[row[1]](row[2])
                levels[time_s] = len(there)
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(f"--trace {path}, line {number}: {','.join(row)!r} cannot be read ({error}).") from error
        last_s = time_s
    return sorted(levels.items())


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
