"""Outcomes as one HTML page without scripts: the fleet and the worlds over time, and lasting work by policy. Pure."""

from collections.abc import Iterable, Sequence
from html import escape

from cluster.simulator.outcome import Outcome
from cluster.traces import Fleet

_WIDTH, _HEIGHT, _MARGIN = 900, 220, 40
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e")


def draw_page(fleets: Sequence[tuple[Fleet, Sequence[Outcome]]]) -> str:
    """Return the page."""
    parts = ["<!doctype html><meta charset=utf-8><title>solvent simulate</title>"]
    parts.append("<style>body{font:14px sans-serif;max-width:940px;margin:2em auto}td,th{padding:0 1em 0 0}</style>")
    for fleet, outcomes in fleets:
        parts.append(f"<h2>{escape(fleet.name)}</h2>")
        parts += _draw_table(outcomes)
        parts.append(_draw_sizes(fleet, outcomes))
        parts.append(_draw_work(fleet, outcomes))
    return "\n".join(parts) + "\n"


def _draw_table(outcomes: Iterable[Outcome]) -> Iterable[str]:
    yield "<table><tr><th>policy<th>goodput<th>share of the fleet<th>USD<th>losses<th>steps redone"
    for outcome in outcomes:
        row = outcome.to_row()
        yield (
            f"<tr><td>{escape(outcome.policy)}<td>{outcome.goodput:.1%}<td>{outcome.fleet_share:.1%}"
            f"<td>{outcome.tally.usd:,.0f}<td>{outcome.tally.losses}<td>{row['steps_redone']}"
        )
    yield "</table>"


def _draw_sizes(fleet: Fleet, outcomes: Sequence[Outcome]) -> str:
    """Draw how many nodes there are, and how many are in a world."""
    levels, there = [(0.0, 0)], 0
    for change in fleet.changes:
        there += len(change.added) - len(change.removed)
        levels.append((change.time_s, there))
    lines = [("nodes granted", levels)]
    lines += [(o.policy, o.tally.sizes) for o in outcomes if o.policy == "solvent" or o.policy.startswith("gang")]
    most = max(1, *(count for _, line in lines for _, count in line))
    return _draw(fleet, [(name, _as_steps(line, fleet.end_s)) for name, line in lines], most=most, title="nodes")


def _draw_work(fleet: Fleet, outcomes: Sequence[Outcome]) -> str:
    lines = [(o.policy, [(0.0, 0.0), *o.tally.work]) for o in outcomes]
    most = max(1.0, *(work for _, line in lines for _, work in line)) / 3600
    scaled = [(name, [(time_s, work / 3600) for time_s, work in line]) for name, line in lines]
    return _draw(fleet, scaled, most=most, title="node-hours of work that lasts")


def _as_steps(levels: Sequence[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for time_s, count in levels:
        if points:
            points.append((time_s, points[-1][1]))
        points.append((time_s, count))
    return [*points, (end_s, points[-1][1])] if points else []


def _draw(fleet: Fleet, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, most: float, title: str) -> str:
    def place(time_s: float, value: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * time_s / max(fleet.end_s, 1.0)
        return f"{x:.1f},{_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * value / most:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="0" y="14">{escape(title)}, at most {most:,.0f}; {fleet.end_s / 3600:,.0f} h</text>')
    for index, (name, points) in enumerate(lines):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(place(time_s, value) for time_s, value in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        parts.append(f'<text x="{_MARGIN + 130 * index}" y="{_HEIGHT - 8}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])
