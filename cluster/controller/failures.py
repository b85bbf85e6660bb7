"""What failures in a row lead to. Pure; `attempts.jsonl` tells the same to a run that is submitted again.

A world that loses a node is business as usual. One that loses a trainer on a living node is a failure: of the node, if
it happens there again and again, or of the run, if no attempt gets past a step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.types import Change


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What went wrong over the life of the run, and what that led to."""

    best_step: int = 0
    """The highest step that was ever finished."""
    without_progress: int = 0
    """Attempts in a row that lost a trainer and finished no new step; only a new step starts the row anew."""
    suspect: str | None = None
    """The node whose trainers took down the last worlds that fell to a trainer."""
    strikes: int = 0
    """How many in a row."""
    denied: frozenset[str] = frozenset()
    """Nodes that are left out."""


def count_failure(failures: Failures, *, change: Change, cause: str | None, progressed: bool) -> Failures:
    """Return what is to be known after an attempt has ended.

    Args:
        cause: the node whose trainer ended first, if that is certain.
        progressed: it finished a step that none before had.
    """
    is_failure = change in ("trainer_lost", "trainer_stalled")
    without_progress = 0 if progressed else failures.without_progress + is_failure
    if is_failure and cause is not None:
        strikes = failures.strikes + 1 if cause == failures.suspect else 1
        failures = replace(failures, suspect=cause, strikes=strikes)
    return replace(failures, without_progress=without_progress)


def deny_suspect(failures: Failures) -> Failures:
    """Leave the suspect out from now on."""
    assert failures.suspect is not None
    return replace(failures, denied=failures.denied | {failures.suspect}, suspect=None, strikes=0)


def read_failures(attempts: Iterable[Mapping[str, Any]]) -> Failures:
    """Return what the rows of `attempts.jsonl` tell; those that were written without a cause tell of progress only."""
    failures = Failures()
    for row in attempts:
        last_step = row["last_step"] or 0
        progressed = last_step > failures.best_step
        failures = replace(failures, best_step=max(failures.best_step, last_step))
        # A row of `python -m elastic`, or of a writer that was killed, has no change: nobody saw why it ended.
        change: Change = row.get("change") or "stopped"
        failures = count_failure(failures, change=change, cause=row.get("cause"), progressed=progressed)
        if row.get("denied"):
            failures = deny_suspect(replace(failures, suspect=row["denied"]))
    return failures
