"""SkyPilot's catalogs, `vms.csv` of a provider, as they are (github.com/skypilot-org/skypilot-catalog). Pure."""

import csv
import io
from datetime import date

from cluster.catalog.offers import Offer, Read, build_offer, keep_prices
from elastic.errors import ConfigError

_NEEDED = {"InstanceType", "AcceleratorName", "AcceleratorCount", "Price", "Region"}
_MARKETPLACES = ("vast",)
"""Their SpotPrice is the least that a host takes as a bid: whoever bids that is outbid."""


def is_skypilot(text: str) -> bool:
    """Tell such a file by its first line."""
    return set(text.partition("\n")[0].strip().split(",")) >= _NEEDED


def read_skypilot(text: str, *, provider: str, day: date, name: str) -> Read:
    """Read the machines with GPUs; each row is an on-demand offer, a spot offer, or both.

    Args:
        day: of which the file is: it does not say.

    Raises:
        ConfigError: a row is not what SkyPilot writes.
    """
    read, offers = Read(), list[Offer]()
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        if not row["AcceleratorName"]:
            continue
        try:
            gpus = float(row["AcceleratorCount"])
            prices = {"on-demand": _to_price(row["Price"]), "spot": _to_price(row.get("SpotPrice"))}
        except ValueError as error:
            raise ConfigError(f"{name}, line {number}: {error}. Take the file anew from SkyPilot.") from error
        if gpus < 1 or gpus % 1:
            read.left_out["a part of a GPU"] += 1
            continue
        if prices["spot"] is not None and provider in _MARKETPLACES:
            read.left_out["the least bid of a marketplace"] += 1
            prices["spot"] = None
        offers += [
            build_offer(
                provider=provider,
                region=row["Region"],
                zone=row.get("AvailabilityZone") or "",
                instance=row["InstanceType"],
                gpu=row["AcceleratorName"],
                gpus=int(gpus),
                kind=kind,
                usd_per_hour=price,
                source=f"SkyPilot's catalog, {name}",
                date=day,
            )
            for kind in ("on-demand", "spot")
            if (price := prices[kind]) is not None
        ]
    return keep_prices(offers, read)


def _to_price(text: str | None) -> float | None:
    return float(text) if text else None
