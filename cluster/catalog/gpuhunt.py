"""Prices of today through the package gpuhunt, which asks some providers itself and reads dstack's catalog of others.

It needs the extra `prices` and a network; with GPUHUNT_CATALOG_DIR it reads catalogs from a folder, and none.
"""

import logging
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.catalog.offers import Offer, Read, build_offer, keep_prices
from elastic.errors import ConfigError

_MARKETPLACES = ("vastai", "lium")
"""Their spot prices are the least bids that hosts take."""
_NAMES = {"lambdalabs": "lambda", "vastai": "vast"}
"""What gpuhunt calls otherwise than we do."""


def fetch_offers(*, day: date, folder: str = "") -> Read:
    """Ask gpuhunt for all machines with GPUs.

    Args:
        folder: what GPUHUNT_CATALOG_DIR is set to, a folder with a CSV per provider; empty: ask the network.

    Raises:
        ConfigError: it is not installed, or has nothing.
    """
    try:
        import gpuhunt  # noqa: PLC0415 - extra `prices`
    except ImportError as error:
        raise ConfigError(
            "offers --refresh needs the package gpuhunt, which is not installed. pip install 'solvent[prices]', or use "
            "the prices that ship with Solvent."
        ) from error
    # It logs what it catches, with its trace; what that means is told below.
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL + 1)
    try:
        if folder:
            providers = sorted(path.stem for path in Path(folder).glob("*.csv"))
            if not providers:
                raise ValueError("no PROVIDER.csv is there")
            items: list[Any] = gpuhunt.Catalog(auto_reload=False).query(provider=providers, min_gpu_count=1)
        else:
            items = gpuhunt.query(min_gpu_count=1)
    except (OSError, ValueError, gpuhunt.GPUHuntError) as error:
        where = f"GPUHUNT_CATALOG_DIR={folder}" if folder else "the network"
        raise ConfigError(
            f"offers --refresh found no prices ({' '.join(str(error).split())}). Look at {where}, or "
            "use the prices that ship with Solvent."
        ) from error
    return read_items(items, day=day, release=version("gpuhunt"))


def read_items(items: Iterable[Any], *, day: date, release: str) -> Read:
    """Return what gpuhunt's catalog items offer."""
    read, offers = Read(), list[Offer]()
    for item in items:
        if item.spot and item.provider in _MARKETPLACES:
            read.left_out["the least bid of a marketplace"] += 1
            continue
        if not item.gpu_name or item.gpu_count < 1:
            continue
        provider = str(_NAMES.get(item.provider, item.provider))
        offers.append(
            build_offer(
                provider=provider,
                region=item.location,
                instance=item.instance_name,
                gpu=_name_gpu(item.gpu_name, item.gpu_memory, item.instance_name),
                gpus=item.gpu_count,
                kind="spot" if item.spot else "on-demand",
                usd_per_hour=item.price,
                source=f"gpuhunt {release}, {item.provider}",
                date=day,
            )
        )
    return keep_prices(offers, read)


def _name_gpu(name: str, memory_gb: float | None, instance: str) -> str:
    """Return a name of ours: gpuhunt says A100 and H100 of all of them, and tells them apart by memory."""
    is_pcie = "pcie" in instance.lower() or instance.startswith(("Standard_NC", "1x_", "NVIDIA H100 PCIe"))
    if name == "A100":
        return f"A100-{40 if memory_gb == 40 else 80}GB-{'PCIe' if is_pcie else 'SXM'}"
    if name == "H100":
        return "H100-PCIe" if "pcie" in instance.lower() else "H100-SXM"
    return {"H100NVL": "H100-NVL", "A6000": "A6000"}.get(name, name)
