"""What one node's notices amount to, and which may be acknowledged: pure.

A provider repeats a notice in every answer, moves its deadline, takes it back, or is silent for a while. An `Outlook`
remembers what was read; `update` takes one reading in and returns what is new; `get_departure` is the sum of it all.
"""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from cluster.providers import NodeNotice

MOVED_S = 1.5
"""A deadline that is this much nearer or farther has been moved; less is the rounding of clocks to seconds."""


def get_drain_s(grace_s: float) -> float:
    """Return the seconds in which a node must be clear: an eighth of the grace period, at least 2 s, is kept back.

    The hook that writes the notice, the poll that reads it and the end of the processes take their part of the period.
    """
    return grace_s - max(2, math.ceil(grace_s / 8))


@dataclass(frozen=True)
class Source:
    """Where a notice was read."""

    provider: str
    feed: str

    def __str__(self) -> str:
        return f"{self.provider} ({self.feed})"


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something new about one notice."""

    kind: Literal["given", "moved", "withdrawn"]
    source: Source
    notice: NodeNotice
    deadline_s: float | None


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A node will be gone."""

    provider: str
    reason: str
    deadline_s: float | None


@dataclass(kw_only=True)
class Outlook:
    """What is known of one node's future."""

    held: dict[tuple[Source, str], Change] = field(default_factory=dict[tuple[Source, str], Change])
    """The last change of each notice that holds, by source and id."""


def update(outlook: Outlook, source: Source, notices: Sequence[NodeNotice], *, now_s: float) -> list[Change]:
    """Take in all notices that hold at a source now; a failed reading is no reading.

    Returns:
        Given, moved and withdrawn notices; nothing for those that are only repeated.
    """
    changes: list[Change] = []
    ids = {notice.id for notice in notices}
    for (held_source, notice_id), held in list(outlook.held.items()):
        if held_source == source and notice_id not in ids:
            del outlook.held[source, notice_id]
            changes.append(Change(kind="withdrawn", source=source, notice=held.notice, deadline_s=held.deadline_s))
    for notice in notices:
        held = outlook.held.get((source, notice.id))
        deadline_s = _get_deadline(notice, held, now_s)
        if held and held.notice.kind == notice.kind and not _is_moved(held.deadline_s, deadline_s):
            continue
        kind = "moved" if held and held.notice.kind == notice.kind else "given"
        change = Change(kind=kind, source=source, notice=notice, deadline_s=deadline_s)
        outlook.held[source, notice.id] = change
        changes.append(change)
    return changes


def get_departure(outlook: Outlook) -> Departure | None:
    """Return the earliest end of the node that any source is sure of; one without a time comes last."""
    leaving = [held for held in outlook.held.values() if held.notice.kind == "leave"]
    first = min(leaving, key=lambda held: (held.deadline_s is None, held.deadline_s or 0.0), default=None)
    if first is None:
        return None
    return Departure(provider=first.source.provider, reason=first.notice.reason, deadline_s=first.deadline_s)


def is_other(known: Departure | None, new: Departure | None) -> bool:
    """Tell whether a departure is news beside one that was acted upon."""
    if known is None or new is None:
        return known is not new
    return _is_moved(known.deadline_s, new.deadline_s)


def _get_deadline(notice: NodeNotice, held: Change | None, now_s: float) -> float | None:
    if notice.lead_s is None:
        return notice.deadline_s
    if held is None or held.deadline_s is None or held.notice.lead_s is None:
        return now_s + notice.lead_s
    # It runs from the first sight: that the provider repeats itself buys no time.
    return held.deadline_s - held.notice.lead_s + notice.lead_s


def _is_moved(before_s: float | None, after_s: float | None) -> bool:
    if before_s is None or after_s is None:
        return before_s is not after_s
    return abs(before_s - after_s) > MOVED_S


@dataclass(frozen=True, kw_only=True)
class Report:
    """A notice of several machines, as the watch of one node has it."""

    id: str
    machine: str
    machines: tuple[str, ...]


def find_acknowledgeable(reports: Mapping[str, Sequence[Report]], clear: AbstractSet[str]) -> dict[str, str]:
    """Return the notices that may be acknowledged, and for each the node whose watch is to do it.

    An acknowledgement lets *all* machines of a notice go at once, so each of them must be known to us, by the report
    of its own watch, and clear: nothing on it is needed any more. A notice that also names a stranger's machine is left
    to run out.

    Args:
        reports: what each node's watch has reported.
        clear: nodes that the run does not need any more.

    Returns:
        Node ids by notice id.
    """
    chosen: dict[str, str] = {}
    cleared: dict[str, set[str]] = {}
    for node in sorted(clear & reports.keys()):
        for report in reports[node]:
            chosen.setdefault(report.id, node)
            cleared.setdefault(report.id, set()).add(report.machine)
    machines: dict[str, set[str]] = {}
    for report in (report for of_node in reports.values() for report in of_node):
        machines.setdefault(report.id, set()).update(report.machines)
    return {id_: node for id_, node in chosen.items() if machines[id_] <= cleared[id_]}
