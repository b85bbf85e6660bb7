"""What a run that was struck has trained on and how long it took, against what an unbroken one does. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from cluster.hazard import predict_goodput
from cluster.ledger import LedgerRow
from elastic.records.attempts import final_rows
from elastic.records.rundir import parse_utc


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of the applied steps, counted with repetition."""

    lost: int
    """That a step should have had and did not."""
    repeated: int
    """That a step had beyond what it should, or more often."""


def count_samples(
    metrics: Iterable[Mapping[str, Any]],
    consumed: Mapping[int, Iterable[Mapping[str, Any]]],
    expected: Callable[[int], Sequence[int]],
) -> Samples:
    """Compare, step by step, the samples consumed with those that the order prescribes.

    A step that was done again counts once, as the attempt did it whose row of `metrics.jsonl` counts. A step missing
    below the last one has lost all its samples; a bad one, which was not applied, should have none.

    Args:
        metrics: rows of `metrics.jsonl`.
        consumed: by attempt, the rows of its `samples-*.jsonl` of all ranks.
        expected: the ids of a step, which is counted from 1.
    """
    final = final_rows(metrics)
    attempts = {row["step"]: row["attempt"] for row in final}
    bad = {row["step"] for row in final if "bad_step" in row}
    found: dict[int, Counter[int]] = {step: Counter() for step in range(1, max(attempts, default=0) + 1)}
    for attempt, rows in consumed.items():
        for row in rows:
            if attempts.get(row["step"]) == attempt:
                found[row["step"]].update(row["ids"])
    lost = repeated = 0
    for step, ids in found.items():
        should = Counter(() if step in bad else expected(step))
        lost += (should - ids).total()
        repeated += (ids - should).total()
    return Samples(lost=lost, repeated=repeated)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The share of time that made lasting progress, beside Young's prediction from the numbers of the same run."""

    measured: float
    """Seconds of the steps that count over seconds from the first step to the last."""
    paid: float | None
    """The same share of the paid seconds of all nodes in that time, from the ledger: what waits to join, or is not
    needed any more, costs as well. None if nothing was paid."""
    predicted: float
    """Of `measured`; the formula knows one machine, not a fleet."""
    save_s: float
    """What held training up between two steps of one world, per save: saves, and evaluations if there are any."""
    interval_s: float
    num_losses: int
    """Changes without notice, by which steps may have to be done again."""
    num_outages: int
    outage_s: float
    """Mean time from the last step of one world to the first of the next."""
    wall_s: float


def measure_goodput(
    metrics: Sequence[Mapping[str, Any]],
    attempts: Iterable[Mapping[str, Any]],
    ledger: Iterable[LedgerRow],
    *,
    save_every_steps: int,
) -> Goodput | None:
    """Return how well a run used its time; None before its second step.

    Args:
        metrics: rows of `metrics.jsonl`, in the order written.
        attempts: rows of `attempts.jsonl`.
        ledger: every tile.
    """
    if len(metrics) < 2:
        return None
    times_s = [parse_utc(row["time_utc"]) for row in metrics]
    wall_s = times_s[-1] - times_s[0] + metrics[0]["step_s"]
    outages_s: list[float] = []
    held_up_s = 0.0
    for (before_s, before), (after_s, after) in pairwise(zip(times_s, metrics, strict=True)):
        if before["attempt"] == after["attempt"]:
            held_up_s += max(0.0, after_s - before_s - after["step_s"])
        else:
            outages_s.append(after_s - before_s)
    num_losses = sum(1 for row in attempts if row["end"] == "lost")
    final = final_rows(metrics)
    step_s = fmean(row["step_s"] for row in final)
    save_s = held_up_s / max(1, len(metrics) // save_every_steps)
    outage_s = fmean(outages_s) if outages_s else 0.0
    predicted = predict_goodput(
        save_s=save_s,
        interval_s=save_every_steps * step_s + save_s,
        between_losses_s=wall_s / num_losses if num_losses else float("inf"),
        between_outages_s=wall_s / len(outages_s) if outages_s else float("inf"),
        outage_s=outage_s,
    )
    return Goodput(
        measured=round(sum(row["step_s"] for row in final) / wall_s, 4),
        paid=get_paid_share(ledger, start_s=times_s[-1] - wall_s, end_s=times_s[-1]),
        predicted=round(predicted, 4),
        save_s=round(save_s, 4),
        interval_s=round(save_every_steps * step_s + save_s, 3),
        num_losses=num_losses,
        num_outages=len(outages_s),
        outage_s=round(outage_s, 3),
        wall_s=round(wall_s, 2),
    )


def get_paid_share(ledger: Iterable[LedgerRow], *, start_s: float, end_s: float) -> float | None:
    """Return which share of the GPU-seconds paid between two moments applied new steps; None if none was paid."""
    start_ms, end_ms = start_s * 1000, end_s * 1000
    paid_ms = train_ms = 0.0
    for row in ledger:
        gpu_ms = max(0.0, min(row.end_ms, end_ms) - max(row.start_ms, start_ms)) * row.gpus
        paid_ms += gpu_ms
        train_ms += gpu_ms if row.state == "train" else 0.0
    return round(train_ms / paid_ms, 4) if paid_ms else None
