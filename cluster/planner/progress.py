"""What a run in progress has measured of itself, from its rows: the plan for the rest of it goes by that. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from cluster.catalog.gpus import SPECS
from cluster.ledger import LedgerRow, totals_of
from cluster.planner.candidates import Known
from cluster.planner.throughput import estimate_step
from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.records.rundir import parse_utc

_RECENT = 50
_FEWEST_ROWS = 5
"""Steps, before a speed counts as measured."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and how that went."""

    step: int
    tokens: int
    tokens_per_s: float | None
    """While steps are made; None: too few were."""
    world_size: int
    gpus: tuple[str, ...]
    """Those whose peak its MFU was computed with; none on CPUs."""
    usd: float
    began_s: float | None
    """Unix time of the first attempt; None: there was none."""
    node_hours: float
    losses: int
    """Worlds that were lost without notice."""
    outage_s: float | None
    """Of the changes of its world; None: there was none."""
    goodput: float
    """Share of the paid time that applied a new step."""

    @property
    def usd_per_hour(self) -> float:
        """What a paid hour of a node cost."""
        return self.usd / self.node_hours if self.node_hours else 0.0


def measure_progress(
    config: RunConfig,
    metrics: Iterable[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
    ledger: Iterable[LedgerRow],
) -> Progress:
    """Return what the rows of a run tell; the newest row of a step counts."""
    by_step = {row["step"]: row for row in metrics}
    rows = [by_step[step] for step in sorted(by_step)]
    last = rows[-1] if rows else None
    world_size = last["world_size"] if last else 0
    recent = [row for row in rows[-_RECENT:] if row["world_size"] == world_size and row.get("tokens_per_s")]
    tiles = list(ledger)
    outages_s = [row["outage_s"] for row in attempts if row.get("outage_s") is not None]
    totals = totals_of(tiles)
    return Progress(
        step=last["step"] if last else 0,
        tokens=last["tokens"] if last else 0,
        tokens_per_s=median(row["tokens_per_s"] for row in recent) if len(recent) >= _FEWEST_ROWS else None,
        world_size=world_size,
        gpus=_find_gpus(config, last) if last else (),
        usd=totals.usd,
        began_s=parse_utc(attempts[0]["start_utc"]) if attempts else None,
        node_hours=sum(tile.end_ms - tile.start_ms for tile in tiles) / 3_600_000,
        losses=sum(row["end"] == "lost" for row in attempts),
        outage_s=median(outages_s) if outages_s else None,
        goodput=totals.goodput,
    )


def _find_gpus(config: RunConfig, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the GPUs with the peak that a row's MFU is a share of."""
    mfu = row.get("mfu")
    if not mfu or not row.get("tokens_per_s"):
        return ()
    flops = row["tokens_per_s"] * config.flops_per_token
    peak = flops / mfu / row["world_size"]
    return tuple(name for name, spec in SPECS.items() if math.isclose(spec.bf16_flops, peak, rel_tol=0.01))


def measure_scales(config: RunConfig, progress: Progress) -> dict[str, float]:
    """Return what steps took as a multiple of what was estimated, for the run's kind of GPU, if that is known.

    Taken on one machine with the GPUs' own links: a slower network is then a part of the multiple.
    """
    if progress.tokens_per_s is None:
        return {}
    step_s = config.train.global_batch * config.data.seq_len / progress.tokens_per_s
    scales: dict[str, float] = {}
    for name in progress.gpus:
        try:
            estimate = estimate_step(
                config, SPECS[name], world_size=progress.world_size, gpus_per_node=progress.world_size
            )
        except ConfigError:
            continue
        scales[name] = step_s / estimate.step_s
    return scales


def learn(config: RunConfig, progress: Progress, known: Known) -> Known:
    """Return what is known once a run's own measurements are added."""
    losses = known.losses_per_node_hour
    if progress.node_hours >= 1 and progress.losses:
        losses = progress.losses / progress.node_hours
    return replace(
        known,
        tokens_done=progress.tokens,
        scales={**known.scales, **measure_scales(config, progress)},
        losses_per_node_hour=losses,
        outage_s=progress.outage_s,
    )


@dataclass(frozen=True, kw_only=True)
class AsNow:
    """The rest of a run if all goes on as it did."""

    hours: float
    usd: float


def extrapolate(config: RunConfig, progress: Progress) -> AsNow | None:
    """Return what is left at the speed, the price and the goodput so far; None where one of them is not known."""
    if progress.tokens_per_s is None or not progress.goodput or not progress.tokens:
        return None
    left = max(0, config.total_tokens - progress.tokens)
    hours = left / (progress.tokens_per_s * progress.goodput) / 3600
    return AsNow(hours=hours, usd=progress.usd / progress.tokens * left)
