"""The curves of the report, thinned to what a screen can show: pure, plain lists for the page's script."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from cluster.ledger import STATES, LedgerRow
from cluster.report.story import Row, Story
from elastic.records.rundir import parse_utc

_MAX_POINTS = 1000
_MAX_TILES = 6000

Point = list[Any]


def build_curves(story: Story) -> dict[str, Any]:
    """Return all curves: loss over tokens; speed, world size and node states over seconds since the run began."""
    times = [(tile.start_ms / 1000, tile.end_ms / 1000) for tile in story.tiles]
    times += [(parse_utc(row["time_utc"]) - row["step_s"], parse_utc(row["time_utc"])) for row in story.all_rows]
    start_s = min((start for start, _ in times), default=0.0)
    end_s = max((end for _, end in times), default=0.0)
    worlds = [list(rows) for _, rows in groupby(story.all_rows, key=lambda row: (row["attempt"], row["world_size"]))]
    return {
        "loss": _thin(_smooth(story.rows), y=1, limit=_MAX_POINTS),
        "valLoss": [[r["tokens"], r["val_loss"]] for r in story.rows if r.get("val_loss") is not None],
        "borders": [[rows[0]["tokens"], rows[0]["attempt"], rows[0]["world_size"]] for rows in worlds],
        "startS": start_s,
        "spanS": end_s - start_s,
        "worlds": [_build_world(rows, start_s, _MAX_POINTS // len(worlds) + 2) for rows in worlds],
        "states": STATES,
        "nodes": _build_nodes(story.tiles, start_s),
        "incidents": [[row["detected_s"] - start_s, row["kind"]] for row in story.incidents if row.get("detected_s")],
    }


def _smooth(rows: Sequence[Row]) -> list[Point]:
    """Return (tokens, loss, smoothed loss, step); losses that are not finite are left out.

    The mean runs forwards and then backwards, so that it does not trail behind a steep curve.
    """
    rows = [row for row in rows if row["loss"] is not None]
    keep = 1 - 1 / max(4, len(rows) / 150)
    forwards = _running_mean([row["loss"] for row in rows], keep)
    smooth = _running_mean(forwards[::-1], keep)[::-1]
    return [
        [row["tokens"], _digits(row["loss"]), _digits(mean), row["step"]]
        for row, mean in zip(rows, smooth, strict=True)
    ]


def _running_mean(values: Sequence[float], keep: float) -> list[float]:
    total = weight = 0.0
    means: list[float] = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _build_world(rows: Sequence[Row], start_s: float, limit: int) -> dict[str, Any]:
    ends = [parse_utc(row["time_utc"]) - start_s for row in rows]
    speed = [[round(t, 3), _digits(row["tokens_per_s"]), row["step"]] for t, row in zip(ends, rows, strict=True)]
    return {
        "attempt": rows[0]["attempt"],
        "size": rows[0]["world_size"],
        "startS": round(ends[0] - rows[0]["step_s"], 3),
        "endS": round(ends[-1], 3),
        "speed": _thin(speed, y=1, limit=limit),
    }


def _build_nodes(tiles: Sequence[LedgerRow], start_s: float) -> list[dict[str, Any]]:
    by_node: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for tile in tiles:
        by_node[tile.node].append(tile)
    limit = max(60, _MAX_TILES // max(1, len(by_node)))
    nodes: list[dict[str, Any]] = []
    for node, own in sorted(by_node.items(), key=lambda item: (min(t.start_ms for t in item[1]), item[0])):
        shown = _merge(sorted(own, key=lambda tile: tile.start_ms), limit)
        bars = [[round(a / 1000 - start_s, 3), round(b / 1000 - start_s, 3), state] for a, b, state in shown]
        nodes.append({"name": node, "gpus": own[0].gpus, "bars": bars})
    return nodes


def _merge(tiles: Sequence[LedgerRow], limit: int) -> list[tuple[int, int, int]]:
    """Return (start, end, index of the state); of too many tiles, the longest state of each column stands for it."""
    bars = [(tile.start_ms, tile.end_ms, STATES.index(tile.state)) for tile in tiles]
    if len(bars) > limit:
        first, span = bars[0][0], bars[-1][1] - bars[0][0]
        columns: list[dict[int, int]] = [defaultdict(int) for _ in range(limit)]
        for start, end, state in bars:
            for column in range((start - first) * limit // span, (end - 1 - first) * limit // span + 1):
                from_ms, to_ms = first + column * span // limit, first + (column + 1) * span // limit
                columns[column][state] += min(end, to_ms) - max(start, from_ms)
        bars = [
            (first + i * span // limit, first + (i + 1) * span // limit, max(ms, key=ms.__getitem__))
            for i, ms in enumerate(columns)
            if ms
        ]
    merged: list[tuple[int, int, int]] = []
    for start, end, state in bars:
        if merged and merged[-1][1] == start and merged[-1][2] == state:
            merged[-1] = (merged[-1][0], end, state)
        else:
            merged.append((start, end, state))
    return merged


def _thin(points: list[Point], *, y: int, limit: int) -> list[Point]:
    """Return at most about `limit` points: of each bucket the lowest and the highest, so that spikes stay visible."""
    if len(points) <= limit:
        return points
    buckets = max(1, limit // 2)
    kept: set[int] = {0, len(points) - 1}
    for bucket in range(buckets):
        inside = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(inside, key=lambda i: points[i][y]), max(inside, key=lambda i: points[i][y])}
    return [points[i] for i in sorted(kept)]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
