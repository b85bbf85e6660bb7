"""Recorded fleets of spot nodes: change points, in the two formats that there are.

`t_s,event,node` (event: add or remove) names nodes; `t_s,nodes` counts them, and its last row is the end.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from elastic.errors import DataError

_NAMED, _COUNTED = ["t_s", "event", "node"], ["t_s", "nodes"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Nodes that come and go at one moment."""

    time_s: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a provider grants over time."""

    name: str
    changes: tuple[Change, ...]
    end_s: float

    @property
    def node_hours(self) -> float:
        """All of it."""
        there, last_s, total_s = 0, 0.0, 0.0
        for change in self.changes:
            total_s += there * (change.time_s - last_s)
            there, last_s = there + len(change.added) - len(change.removed), change.time_s
        return (total_s + there * (self.end_s - last_s)) / 3600

    def get_levels(self) -> list[tuple[float, int]]:
        """Return its size over time; the last row is the end."""
        there, levels = 0, [(0.0, 0)]
        for change in self.changes:
            there += len(change.added) - len(change.removed)
            levels.append((change.time_s, there))
        return [*levels, (self.end_s, there)]


def load_fleet(path: Path, *, seed: int = 0) -> Fleet:
    """Read a trace with its nodes; where it counts them, those that go are drawn by lot.

    Raises:
        DataError: as `load_trace`.
    """
    levels = load_trace(path)
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    if rows[0] == _COUNTED:
        return count_fleet(levels, name=path.stem, seed=seed)
    by_time: dict[float, tuple[list[str], list[str]]] = {}
    times: Counter[str] = Counter()
    for time_s, event, node in rows[1:]:
        added, removed = by_time.setdefault(float(time_s), ([], []))
        times[node] += event == "add"
        name = f"{node}.{times[node]}"  # one that comes back is another rental
        (added if event == "add" else removed).append(name)
    changes = tuple(
        Change(time_s=time_s, added=tuple(a), removed=tuple(r)) for time_s, (a, r) in sorted(by_time.items())
    )
    return Fleet(name=path.stem, changes=changes, end_s=levels[-1][0])


def count_fleet(levels: Sequence[tuple[float, int]], *, name: str, seed: int = 0) -> Fleet:
    """Return the fleet of which only the size is known; who goes is drawn by lot."""
    lots, there, num_seen = Random(seed), list[str](), 0
    changes: list[Change] = []
    for time_s, count in levels:
        added = tuple(f"n{num_seen + index}" for index in range(max(0, count - len(there))))
        removed = tuple(lots.sample(there, max(0, len(there) - count)))
        num_seen += len(added)
        there = [node for node in [*there, *added] if node not in removed]
        if added or removed:
            changes.append(Change(time_s=time_s, added=added, removed=removed))
    return Fleet(name=name, changes=tuple(changes), end_s=levels[-1][0])


def as_gang(fleet: Fleet, size: int) -> Fleet:
    """Return the fleet as somebody meets it who takes all of so many nodes or none: whole while as many are there.

    Who goes while more are left is replaced at once by one of these.
    """
    there, is_up, turn = 0, False, 0
    changes: list[Change] = []
    for change in fleet.changes:
        there += len(change.added) - len(change.removed)
        nodes = tuple(f"g{index}.{turn}" for index in range(size))
        lost = is_up and bool(change.removed)
        if is_up and (there < size or lost):
            changes.append(Change(time_s=change.time_s, removed=nodes))
            is_up = False
        if not is_up and there >= size:
            turn += 1
            nodes = tuple(f"g{index}.{turn}" for index in range(size))
            changes.append(Change(time_s=change.time_s, added=nodes))
            is_up = True
    return Fleet(name=f"{fleet.name}-gang-{size}", changes=tuple(changes), end_s=fleet.end_s)


def check_fleet(fleet: Fleet) -> list[str]:
    """Return what is wrong with a fleet: nodes that come twice or go without being there, times that go back."""
    problems: list[str] = []
    there: set[str] = set()
    for change in fleet.changes:
        problems += [f"{node} comes twice" for node in change.added if node in there]
        there |= set(change.added)
        problems += [f"{node} goes and is not there" for node in change.removed if node not in there]
        there -= set(change.removed)
    times = [change.time_s for change in fleet.changes]
    problems += ["times go back" for a, b in pairwise([*times, fleet.end_s]) if b < a]
    return problems


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
            if not math.isfinite(time_s):
                raise ValueError("the time is no number")
            if time_s < last_s:
                raise ValueError(f"the time goes back from {last_s:g}")
            if header == _COUNTED:
                if int(row[1]) < 0:
                    raise ValueError("there cannot be less than no node")
                levels[time_s] = int(row[1])
            else:
                {"add": there.add, "remove": there.discard}[row[1]](row[2])
                levels[time_s] = len(there)
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(f"--trace {path}, line {number}: {','.join(row)!r} cannot be read ({error}).") from error
        last_s = time_s
    return sorted(levels.items())
