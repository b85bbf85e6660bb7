"""Whose fault a dollar was: every paid one is either progress, or put down to an incident or to another cause. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.ledger import CAUSES, LedgerRow


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one incident cost."""

    kind: str
    node: str | None
    step: int | None
    outage_usd: float
    """While no step was made: of all nodes that were paid meanwhile."""
    redo_usd: float
    """For steps that were done again afterwards."""

    @property
    def usd(self) -> float:
        """Both."""
        return self.outage_usd + self.redo_usd


@dataclass(frozen=True, kw_only=True)
class Waste:
    """All dollars of a run, each in one place."""

    progress_usd: float
    incidents: tuple[Share, ...]
    other_usd: Mapping[str, float]
    """Outside of incidents, by cause."""

    @property
    def usd(self) -> float:
        """All of it."""
        return self.progress_usd + sum(share.usd for share in self.incidents) + sum(self.other_usd.values())


def split_dollars(tiles: Iterable[LedgerRow], incidents: Sequence[Mapping[str, Any]]) -> Waste:
    """Put every dollar of a ledger in its place.

    Args:
        incidents: rows of `incidents.jsonl`. One lasts from the last step before it to the first after it; steps that
            are done again from then on, until the next one, are its as well.
    """
    spans = _get_spans_ms(incidents)
    outage_usd, redo_usd = [0.0] * len(incidents), [0.0] * len(incidents)
    progress_usd, other_usd = 0.0, defaultdict[str, float](float)
    for tile in tiles:
        left_usd = tile.usd
        length_ms = tile.end_ms - tile.start_ms
        if tile.state == "train":
            progress_usd += left_usd
            continue
        for place, ((start_ms, end_ms), index) in enumerate(spans):
            if start_ms >= tile.end_ms:
                break
            inside_ms = max(0, min(tile.end_ms, end_ms) - max(tile.start_ms, start_ms))
            next_ms = spans[place + 1][0][0] if place + 1 < len(spans) else tile.end_ms
            after_ms = max(0, min(tile.end_ms, next_ms) - max(tile.start_ms, end_ms)) if tile.state == "redo" else 0
            outage_usd[index] += tile.usd * inside_ms / length_ms
            redo_usd[index] += tile.usd * after_ms / length_ms
            left_usd -= tile.usd * (inside_ms + after_ms) / length_ms
        other_usd[CAUSES.get(tile.state, tile.state)] += left_usd
    shares = tuple(
        Share(
            kind=str(row.get("kind")),
            node=row.get("node"),
            step=row.get("step"),
            outage_usd=outage_usd[index],
            redo_usd=redo_usd[index],
        )
        for index, row in enumerate(incidents)
    )
    return Waste(progress_usd=progress_usd, incidents=shares, other_usd=dict(other_usd))


def _get_spans_ms(incidents: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[int, int], int]]:
    """Return the time of each incident and its index, in order and without overlaps; those of unknown time are left
    out."""
    spans: list[tuple[tuple[int, int], int]] = []
    for index, row in enumerate(incidents):
        if row.get("detected_s") is None:
            continue
        start_s = row["detected_s"] - (row.get("phases_s") or {}).get("detect", 0.0)
        spans.append(((round(1000 * start_s), round(1000 * (start_s + (row.get("outage_s") or 0.0)))), index))
    spans.sort()
    cut: list[tuple[tuple[int, int], int]] = []
    for (start_ms, end_ms), index in spans:
        start_ms = max(start_ms, cut[-1][0][1]) if cut else start_ms  # noqa: PLW2901 (the same, cut)
        cut.append(((start_ms, max(start_ms, end_ms)), index))
    return cut
