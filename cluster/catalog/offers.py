"""What can be rented: offers with their price, where that is from and of which day. Pure.

What is not a price is left out and counted: 0, a spot price that is not below the same machine's on-demand price (a
provider lists that where it has no spot), and the least that a marketplace takes as a bid.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from cluster.catalog.gpus import find_spec
from elastic.errors import ConfigError

Kind = Literal["on-demand", "spot", "bid", "reserved"]
KINDS: tuple[Kind, ...] = ("on-demand", "spot", "bid", "reserved")

COLUMNS = (
    "provider",
    "region",
    "zone",
    "instance",
    "gpu",
    "gpus",
    "kind",
    "usd_per_hour",
    "network_gbits",
    "source",
    "date",
)
"""Of our CSV files; the first line names them."""

NOTICE_S: Mapping[str, float] = {"aws": 120, "gcp": 30, "azure": 30, "runpod": 5, "vast": 0}
"""Lead time of a preemption, as `cluster/providers` reads it (cluster/README.md); not known of others."""
BILLING_S: Mapping[str, float] = {"aws": 1, "lambda": 60, "hyperstack": 60, "runpod": 1, "openrelay": 1}
"""Billing unit. Source: the pages that `snapshot.csv` names; not known of others."""
EGRESS_USD_PER_GIB: Mapping[str, float] = {"lambda": 0.0, "runpod": 0.0, "openrelay": 0.0}
"""Source: as above."""
STORAGE_USD_PER_GIB_MONTH: Mapping[str, float] = {"runpod": 0.1}
"""Of disks beside the GPUs. Source: huggingface.co/datasets/600me/gpu-cloud-h100-a100-pricing-benchmark, 2026-10-19."""

SPOT_LOSSES_PER_NODE_HOUR: Mapping[str, float] = {"aws": 0.060, "gcp": 0.099}
"""Source: counted in public traces: AWS V100 x 4, us-east-2a, 75 losses in 1,250 node-hours
(skynomad-artifact@62b9aaa); GCP A100, us-east1-b, 154 in 1,548 (uclasystem/bamboo@80809293)."""
_OTHER_SPOT_LOSSES_PER_NODE_HOUR = 0.060
"""Assumed of providers without a trace: as AWS."""
ON_DEMAND_LOSSES_PER_GPU_HOUR = 419 / (54 * 24 * 16384)
"""Failures that are nobody's will. Source: Llama 3, arXiv:2407.21783, section 3.3.4: 419 in 54 days on 16,384 H100."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One kind of machine at one place, one way to pay for it."""

    provider: str
    region: str
    instance: str
    gpu: str
    """A name of `gpus.SPECS`, or whatever the catalog says of a GPU that we know nothing of."""
    gpus: int
    kind: Kind
    usd_per_hour: float
    """Of the whole machine."""
    source: str
    date: date
    """The day on which this was the price."""
    zone: str = ""
    network_gbits: float | None = None
    """Between machines; None: not known."""
    notice_s: float | None = None
    billing_s: float | None = None
    storage_usd_per_gib_month: float | None = None
    egress_usd_per_gib: float | None = None
    losses_per_hour: float = 0.0
    """Of one machine."""
    max_nodes: int | None = None
    """How many there are; None: not known."""

    @property
    def usd_per_gpu_hour(self) -> float:
        """The price of one GPU."""
        return self.usd_per_hour / self.gpus

    @property
    def id(self) -> str:
        """What `prices.yaml` calls it."""
        place = f"{self.region}/{self.zone}" if self.zone else self.region
        return f"{self.provider}/{self.instance}/{place}/{self.kind}"


@dataclass(kw_only=True)
class Read:
    """What was found in a source of prices."""

    offers: list[Offer] = field(default_factory=list[Offer])
    left_out: Counter[str] = field(default_factory=Counter[str])
    """How many rows were no offers, by the reason."""


def build_offer(
    *,
    provider: str,
    region: str,
    instance: str,
    gpu: str,
    gpus: int,
    kind: Kind,
    usd_per_hour: float,
    source: str,
    date: date,
    zone: str = "",
    network_gbits: float | None = None,
    losses_per_hour: float | None = None,
    notice_s: float | None = None,
    max_nodes: int | None = None,
) -> Offer:
    """Return an offer with what is known of its provider and kind."""
    spec = find_spec(gpu)
    if losses_per_hour is None:
        losses_per_hour = ON_DEMAND_LOSSES_PER_GPU_HOUR * gpus
        if kind in ("spot", "bid"):
            losses_per_hour += SPOT_LOSSES_PER_NODE_HOUR.get(provider, _OTHER_SPOT_LOSSES_PER_NODE_HOUR)
    return Offer(
        provider=provider,
        region=region,
        zone=zone,
        instance=instance,
        gpu=spec.name if spec else gpu,
        gpus=gpus,
        kind=kind,
        usd_per_hour=usd_per_hour,
        network_gbits=network_gbits,
        notice_s=NOTICE_S.get(provider) if notice_s is None else notice_s,
        billing_s=BILLING_S.get(provider),
        storage_usd_per_gib_month=STORAGE_USD_PER_GIB_MONTH.get(provider),
        egress_usd_per_gib=EGRESS_USD_PER_GIB.get(provider),
        losses_per_hour=losses_per_hour,
        max_nodes=max_nodes,
        source=source,
        date=date,
    )


def keep_prices(offers: Iterable[Offer], read: Read | None = None) -> Read:
    """Leave out what is not a price, and say how often for which reason."""
    read = read or Read()
    offers = list(offers)
    on_demand = {
        (offer.provider, offer.instance, offer.region, offer.zone): offer.usd_per_hour
        for offer in offers
        if offer.kind == "on-demand"
    }
    for offer in offers:
        full = on_demand.get((offer.provider, offer.instance, offer.region, offer.zone), math.inf)
        if not 0 < offer.usd_per_hour < math.inf:
            read.left_out["a price of 0"] += 1
        elif offer.kind == "spot" and offer.usd_per_hour >= full:
            read.left_out["spot that costs as much as on-demand"] += 1
        else:
            read.offers.append(offer)
    return read


def read_csv(text: str, *, name: str) -> Read:
    """Read offers as `dump_csv` writes them.

    Raises:
        ConfigError: it is something else, or a row has no source.
    """
    rows = csv.DictReader(io.StringIO(text))
    missing = set(COLUMNS) - set(rows.fieldnames or ())
    if missing:
        raise ConfigError(
            f"{name} has no column {', '.join(sorted(missing))}. Its first line must be: {','.join(COLUMNS)}."
        )
    offers: list[Offer] = []
    for number, row in enumerate(rows, start=2):
        try:
            kind: Kind = next(kind for kind in KINDS if kind == row["kind"])
            if not row["source"]:
                raise ValueError("it names no source")
            offers.append(
                build_offer(
                    provider=row["provider"],
                    region=row["region"],
                    zone=row["zone"],
                    instance=row["instance"],
                    gpu=row["gpu"],
                    gpus=int(row["gpus"]),
                    kind=kind,
                    usd_per_hour=float(row["usd_per_hour"]),
                    network_gbits=float(row["network_gbits"]) if row["network_gbits"] else None,
                    source=row["source"],
                    date=date.fromisoformat(row["date"]),
                )
            )
        except (ValueError, StopIteration) as error:
            why = str(error) or f"kind={row['kind']!r} is none of {', '.join(KINDS)}"
            raise ConfigError(f"{name}, line {number}: {why}. Correct the line, or leave it out.") from error
    return keep_prices(offers)


def dump_csv(offers: Iterable[Offer]) -> str:
    """Return offers as a CSV file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for offer in offers:
        writer.writerow(["" if (value := getattr(offer, column)) is None else value for column in COLUMNS])
    return out.getvalue()
