"""What a real run's rows say of the numbers that a simulation goes by. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from cluster.ledger import LedgerRow
from cluster.simulator.saving import Saving
from elastic.errors import DataError
from elastic.records.rundir import parse_utc

_STARTING = ("start", "wait")
_WORKING = ("train", "redo")
_BESIDE = ("data", "save", "eval")
"""What a world in good health does between its steps."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Means over the changes that a run has seen."""

    step_s: float
    rates: Mapping[int, float]
    """Speed of worlds by their size, that of the largest being its size."""
    loss_s: float
    """From the last step before a loss to the first after it."""
    planned_s: float
    """The same where a world was asked to end: to grow, or by a notice."""
    unsaved_s: float
    """Training that a lost node has done again: at any step of the run, on average."""
    start_s: float
    """From the first second that is paid of a node that joins a run under way until its world takes it."""
    linger_s: float
    """How long a node is paid for after the world that it left."""
    steady_share: float
    """Of the paid time of a world between two changes, what the ledger calls training."""
    step_share: float
    """Of the time between its first step and its last, what `step_s` of its rows says."""

    def build_saving(self, *, durable_s: float) -> Saving:
        """Return it as a way to save."""
        return Saving(
            name="measured",
            kind="memory",
            save_s=0.0,
            recovery_s=self.loss_s,
            planned_s=self.planned_s,
            unsaved_s=self.unsaved_s,
            durable_s=durable_s,
            park_s=0.0,  # the outages are whole ones
            leave_s=0.0,
        )


def measure(
    metrics: Sequence[Mapping[str, Any]], attempts: Iterable[Mapping[str, Any]], ledger: Iterable[LedgerRow]
) -> Measured:
    """Return what a run has measured.

    Raises:
        DataError: its world has not lost a node and grown again, so what that takes is not known.
    """
    worlds = list(attempts)
    losses = [later for world, later in pairwise(worlds) if world["end"] == "lost"]
    planned = [later for world, later in pairwise(worlds) if world["end"] == "interrupted"]
    steps_s = _measure_steps_s(metrics)
    nodes = _group(ledger)
    first_ms = min((tile.start_ms for tiles in nodes for tile in tiles if tile.state in _WORKING), default=0)
    joined = [tiles for tiles in nodes if tiles[0].start_ms > first_ms]
    starts_ms = [_measure_start_ms(tiles) for tiles in joined if any(tile.state in _WORKING for tile in tiles)]
    outages = [row["outage_s"] for row in (*losses, *planned) if row.get("outage_s") is not None]
    if not (losses and planned and starts_ms and outages):
        raise DataError(
            f"the run has seen {len(losses)} loss(es), {len(planned)} planned change(s) and {len(starts_ms)} node(s) "
            "that joined it, and one of each is needed to tell what they take. Give one that has, such as of `solvent "
            "chaos` with the faults remove and add."
        )
    most = max(steps_s)
    last_ms = max(tile.end_ms for tiles in nodes for tile in tiles)
    left = [tiles for tiles in nodes if tiles[-1].end_ms < last_ms]
    return Measured(
        step_s=steps_s[most],
        rates={size: most * steps_s[most] / step_s for size, step_s in steps_s.items()},
        loss_s=_mean_outage_s(losses, outages),
        planned_s=_mean_outage_s(planned, outages),
        unsaved_s=steps_s[most] * _measure_unsaved_steps(metrics, losses),
        start_s=fmean(starts_ms) / 1000,
        linger_s=fmean(_measure_linger_ms(tiles) for tiles in left) / 1000 if left else 0.0,
        steady_share=_measure_steady_share(nodes),
        step_share=_measure_step_share(metrics),
    )


def _measure_unsaved_steps(metrics: Iterable[Mapping[str, Any]], losses: Iterable[Mapping[str, Any]]) -> float:
    """Return it from what every row says a loss would redo; without, from the few losses that there were."""
    said = [row["redo_steps_node_lost"] for row in metrics if row.get("redo_steps_node_lost") is not None]
    return fmean(said or [row["lost_steps"] for row in losses])


def _measure_steps_s(metrics: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    by_size: defaultdict[int, list[float]] = defaultdict(list)
    for row in metrics:
        by_size[row["world_size"]].append(row["step_s"])
    return {size: median(steps_s) for size, steps_s in by_size.items()}


def _group(ledger: Iterable[LedgerRow]) -> list[list[LedgerRow]]:
    by_node: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for tile in ledger:
        by_node[tile.node].append(tile)
    return [sorted(tiles, key=lambda tile: tile.start_ms) for tiles in by_node.values()]


def _mean_outage_s(rows: Iterable[Mapping[str, Any]], others_s: Sequence[float]) -> float:
    return fmean([row["outage_s"] for row in rows if row.get("outage_s") is not None] or others_s)


def _measure_start_ms(tiles: Sequence[LedgerRow]) -> int:
    return next(tile.start_ms for tile in tiles if tile.state not in _STARTING) - tiles[0].start_ms


def _measure_linger_ms(tiles: Sequence[LedgerRow]) -> int:
    return tiles[-1].end_ms - max((tile.end_ms for tile in tiles if tile.state != "idle"), default=tiles[-1].end_ms)


def _measure_step_share(metrics: Sequence[Mapping[str, Any]]) -> float:
    steps_s = time_s = 0.0
    for before, after in pairwise(metrics):
        if before["attempt"] == after["attempt"]:
            steps_s += after["step_s"]
            time_s += parse_utc(after["time_utc"]) - parse_utc(before["time_utc"])
    return min(1.0, steps_s / time_s) if time_s > 0 else 1.0


def _measure_steady_share(nodes: Iterable[Sequence[LedgerRow]]) -> float:
    by_state: defaultdict[str, int] = defaultdict(int)
    for tile in (tile for tiles in nodes for tile in tiles):
        by_state[tile.state] += tile.end_ms - tile.start_ms
    working = sum(by_state[state] for state in _WORKING)
    return working / (working + sum(by_state[state] for state in _BESIDE)) if working else 1.0
