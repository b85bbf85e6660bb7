"""`attempts.jsonl`: one row per world that trained, how it ended and what its loss cost.

An attempt whose writer was killed left rows in `metrics.jsonl` and none here; the next one writes what it can tell.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from elastic.ports import Source
from elastic.records.rundir import RunDir, append_row, end_torn_line, format_utc, parse_utc, read_rows

End = Literal["finished", "interrupted", "lost", "failed"]


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """One line of `attempts.jsonl`."""

    attempt: int
    world_size: int
    nodes: Sequence[str]
    start_utc: str
    end_utc: str
    end: End
    reason: str
    first_step: int | None
    """None: no step was finished."""
    last_step: int | None
    resumed_from: Source | None
    """None: killed before it could say."""
    lost_steps: int
    """Steps that the attempt before had applied and this one had to do again, from where that one had come to: what
    earlier losses cost is in their own rows. 0 if this one applied none; the next one that does has them."""
    outage_s: float
    """From the last step of an earlier attempt to the first of this one (or to its end, if it finished none)."""
    change: str | None = None
    """What ended it, as the cluster's controller calls that; None: no controller saw it."""
    cause: str | None = None
    """The node that left, was lost or lost a trainer, if that is certain."""
    denied: str | None = None
    """The node that is left out since."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What attempts so far have done."""

    attempt: int = 0
    """The newest; 0: none."""
    step: int = 0
    """The highest ever applied."""
    last_step: int = 0
    """The newest that the newest attempt with a step has applied; below `step` after a rewind."""
    last_step_s: float | None = None
    """Unix time at which the newest step was finished."""


def read_history(run_dir: RunDir) -> History:
    """Return what the run's files tell of earlier attempts."""
    history = _history_of(read_rows(run_dir.metrics))
    attempts = (row["attempt"] for row in read_rows(run_dir.attempts))
    newest = max(attempts, default=0)
    return replace(history, attempt=max(history.attempt, newest))


def next_attempt(run_dir: RunDir) -> int:
    """Return the number of the next world of this run, from 1."""
    return read_history(run_dir).attempt + 1


def build_row(
    history: History,
    *,
    attempt: int,
    world_size: int,
    nodes: Sequence[str],
    start_s: float,
    end_s: float,
    end: End,
    reason: str,
    resumed_from: Source | None,
    resumed_step: int,
    last_step: int,
    first_step_s: float | None,
    change: str | None = None,
    cause: str | None = None,
    denied: str | None = None,
) -> AttemptRow:
    """Return the row of an attempt that has ended.

    Args:
        history: what earlier attempts had done when this one started.
        resumed_step: the step of the state it started from.
        last_step: the newest step it applied; `resumed_step` if none.
        first_step_s: Unix time at which its first step was finished; None if none was.
    """
    outage_s = 0.0
    if history.last_step_s is not None:
        outage_s = max(0.0, (end_s if first_step_s is None else first_step_s) - history.last_step_s)
    stepped = last_step > resumed_step
    return AttemptRow(
        attempt=attempt,
        world_size=world_size,
        nodes=nodes,
        start_utc=format_utc(start_s),
        end_utc=format_utc(end_s),
        end=end,
        reason=reason,
        first_step=resumed_step + 1 if stepped else None,
        last_step=last_step if stepped else None,
        resumed_from=resumed_from,
        lost_steps=max(0, history.last_step - resumed_step) if stepped else 0,
        outage_s=round(outage_s, 3),
        change=change,
        cause=cause,
        denied=denied,
    )


def close_torn_attempts(
    run_dir: RunDir, *, reason: str = "killed before it could say why", change: str | None = None
) -> None:
    """Write the missing row of each attempt that trained but was killed before it could say how it ended.

    Call it while nobody trains, before the next attempt starts.

    Args:
        reason, change: as in `AttemptRow`.
    """
    written = {row["attempt"] for row in read_rows(run_dir.attempts)}
    rows = list(read_rows(run_dir.metrics))
    end_torn_line(run_dir.attempts)
    for attempt in sorted({row["attempt"] for row in rows} - written):
        own = [row for row in rows if row["attempt"] == attempt]
        first, last = own[0], own[-1]
        first_step_s = parse_utc(first["time_utc"])
        row = build_row(
            _history_of(row for row in rows if row["attempt"] < attempt),
            attempt=attempt,
            world_size=first["world_size"],
            nodes=[],
            start_s=first_step_s - first["step_s"],
            end_s=parse_utc(last["time_utc"]),
            end="lost",
            reason=reason,
            change=change,
            resumed_from="scratch" if first["step"] == 1 and not run_dir.origin.exists() else None,
            resumed_step=first["step"] - 1,
            last_step=last["step"],
            first_step_s=first_step_s,
        )
        append_row(run_dir.attempts, asdict(row))


def final_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that count, by step: after a rewind steps repeat, and the last row of a step wins.

    Except over one of a newer attempt: that is of a process that came back late.
    """
    by_step: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        if row["attempt"] >= by_step.get(row["step"], row)["attempt"]:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def _history_of(rows: Iterable[Mapping[str, Any]]) -> History:
    attempt, step, last_step, time_utc = 0, 0, 0, None
    for row in rows:
        if row["attempt"] >= attempt:  # an older one is of a process that came back late
            attempt, last_step = row["attempt"], row["step"]
        step, time_utc = max(step, row["step"]), row["time_utc"]
    return History(
        attempt=attempt, step=step, last_step=last_step, last_step_s=parse_utc(time_utc) if time_utc else None
    )
