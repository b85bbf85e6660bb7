"""What a run along a trace will come to, said before it begins: simulated with what an earlier run has measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.traces import Change, Fleet

if TYPE_CHECKING:
    from cluster.chaos.faults import Fault
    from cluster.ledger import LedgerRow
    from cluster.simulator.measured import Measured
    from elastic.config import RunConfig

_FOREVER_S = 1e6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """As `cluster.chaos.verdict.Goodput` has them."""

    measured: float
    """Share of the time from the first step on that goes into steps that count."""
    paid: float
    """The same of the paid seconds of all nodes."""
    losses: int
    wall_s: float


def predict(
    config: "RunConfig",
    faults: "Iterable[Fault]",
    *,
    num_nodes: int,
    end_s: float,
    measured: "Measured",
    boot_s: float,
) -> Prediction:
    """Play the faults in a fake clock.

    Args:
        end_s: after the first step.
        boot_s: from the decision to start a node until it is paid for; they are started one after the other.
    """
    from cluster.chaos.verdict import get_paid_share
    from cluster.ledger import LedgerRow
    from cluster.simulator.engine import simulate
    from cluster.simulator.setup import Setup

    setup = Setup(
        saving=measured.build_saving(durable_s=config.checkpoint.every_steps * measured.step_s / 2),
        world_sizes=config.get_world_sizes(),
        step_node_s=measured.step_s,
        start_s=measured.start_s,
        rates=measured.rates,
    )
    alone = simulate(_build_fleet([], num_nodes=num_nodes, first_s=0.0, end_s=_FOREVER_S, boot_s=boot_s), setup)
    first_s = min(row.start_ms for row in alone.rows if row.state == "train") / 1000
    fleet = _build_fleet(list(faults), num_nodes=num_nodes, first_s=first_s, end_s=end_s, boot_s=boot_s)
    tally = simulate(fleet, setup)
    gone = [(node, change.time_s) for change in fleet.changes for node in change.removed]
    lingering = [
        LedgerRow(
            node=node,
            start_ms=round(1000 * time_s),
            end_ms=round(1000 * (time_s + measured.linger_s)),
            state="idle",
            gpus=1,
            usd=0.0,
        )
        for node, time_s in gone
    ]
    paid = get_paid_share([*tally.rows, *lingering], start_s=first_s, end_s=first_s + end_s) or 0.0
    return Prediction(
        measured=round(measured.step_share * _sum_any(tally.rows) / end_s, 4),
        paid=round(measured.steady_share * paid, 4),
        losses=tally.losses,
        wall_s=end_s,
    )


def measure_boot_s(faults: Iterable[Mapping[str, Any]]) -> float:
    """Return how long it took to start a node, of what `solvent chaos` tells of its faults; 0 if it started none."""
    late_s = [fault["elapsed_s"] - fault["due_s"] for fault in faults if fault["is_add"] and fault["due_s"] is not None]
    return sum(late_s) / len(late_s) if late_s else 0.0


def _build_fleet(faults: "Sequence[Fault]", *, num_nodes: int, first_s: float, end_s: float, boot_s: float) -> Fleet:
    """Return the fleet that faults make; a batch of losses goes at one moment."""
    there = [f"n{index}" for index in range(num_nodes)]
    num_started, free_s = num_nodes, 0.0
    by_time: dict[float, tuple[list[str], list[str]]] = {0.0: (list(there), [])}
    for fault in sorted(faults, key=lambda fault: fault.at_s or 0.0):
        at_s = max(fault.at_s or 0.0, free_s)
        if fault.fault == "add":
            at_s = free_s = at_s + boot_s
        added, removed = by_time.setdefault(first_s + at_s, ([], []))
        if fault.fault == "add":
            there.append(f"n{num_started}")
            added.append(there[-1])
            num_started += 1
        elif there:
            removed.append(there.pop(0))
    changes = tuple(
        Change(time_s=time_s, added=tuple(added), removed=tuple(removed))
        for time_s, (added, removed) in sorted(by_time.items())
        if time_s <= first_s + end_s
    )
    return Fleet(name="planned", changes=changes, end_s=first_s + end_s)


def _sum_any(rows: "Iterable[LedgerRow]") -> float:
    """Return the seconds in which any node trained."""
    total_ms = until_ms = 0
    for row in sorted((row for row in rows if row.state == "train"), key=lambda row: row.start_ms):
        total_ms += max(0, row.end_ms - max(row.start_ms, until_ms))
        until_ms = max(until_ms, row.end_ms)
    return total_ms / 1000
