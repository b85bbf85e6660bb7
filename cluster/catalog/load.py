"""All offers there are: the snapshot that ships or what was refreshed since, and what the user says of prices."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from cluster.catalog.offers import KINDS, Offer, Read, build_offer, dump_csv, read_csv
from cluster.catalog.skypilot import is_skypilot, read_skypilot
from elastic.errors import ConfigError
from elastic.paths import expand_home

SNAPSHOT = Path(__file__).parent / "snapshot.csv"
OLD_AFTER_DAYS = 30
"""Prices older than this are said to be old."""
_HINT = "Write `provider/instance/region/kind: USD per GPU-hour` (with * for any), or a list of offers of your own."


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Offers, and how far to trust them."""

    offers: tuple[Offer, ...]
    left_out: Mapping[str, int]
    """Rows that were no prices, by the reason."""

    @property
    def as_of(self) -> date | None:
        """The day of the oldest price."""
        return min((offer.date for offer in self.offers), default=None)

    @property
    def newest(self) -> date | None:
        """The day of the newest price."""
        return max((offer.date for offer in self.offers), default=None)

    def describe_age(self, today: date) -> str:
        """Say of which days the prices are, and whether that is long ago."""
        if self.as_of is None or self.newest is None:
            return "no prices"
        days = (today - self.newest).days
        text = f"prices as of {self.as_of}" + (f" to {self.newest}" if self.newest != self.as_of else "")
        return f"{text}: {days} days old; `solvent offers --refresh`" if days > OLD_AFTER_DAYS else text


def get_cache(home: str | None = None) -> Path:
    """Return where refreshed offers are kept."""
    base = home or os.environ.get("XDG_CACHE_HOME") or expand_home("~/.cache")
    return Path(base) / "solvent" / "offers.csv"


def keep(read: Read, cache: Path) -> None:
    """Keep refreshed offers for the next calls."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(dump_csv(read.offers), encoding="utf-8")


def load_catalog(*, prices: str | None = None, catalogs: tuple[str, ...] = (), cache: Path | None = None) -> Catalog:
    """Bring all offers together.

    Args:
        prices: the user's own `prices.yaml`, which wins.
        catalogs: CSV files instead of ours: of SkyPilot (provider and day: the names of its folder and its day on
            disk) or as `solvent offers --csv` writes them.
        cache: what was refreshed; used if it is there.

    Raises:
        ConfigError: a file cannot be read, or says what is no price.
    """
    read = Read()
    for path in [Path(expand_home(name)) for name in catalogs] or [cache if cache and cache.exists() else SNAPSHOT]:
        part = _read(path)
        read.offers += part.offers
        read.left_out += part.left_out
    offers = read.offers
    if prices:
        offers = override(offers, _load_yaml(prices), name=prices)
    return Catalog(offers=tuple(offers), left_out=Counter(read.left_out))


def _read(path: Path) -> Read:
    try:
        text = path.read_text(encoding="utf-8")
        day = date.fromtimestamp(path.stat().st_mtime)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--catalog {path} cannot be read ({error}). Give the path of a CSV file.") from error
    if is_skypilot(text):
        return read_skypilot(text, provider=path.resolve().parent.name, day=day, name=str(path))
    return read_csv(text, name=str(path))


def _load_yaml(name: str) -> Any:
    try:
        return yaml.safe_load(Path(expand_home(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--prices {name} cannot be read ({error.strerror}). Correct the path.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--prices {name} is not YAML: {' '.join(str(error).split())}. {_HINT}") from error


def override(offers: list[Offer], content: Any, *, name: str) -> list[Offer]:
    """Apply what a user says: prices per GPU-hour by the offers' ids, or offers of their own.

    Raises:
        ConfigError: it says neither, or means no offer.
    """
    today = date.today()
    if isinstance(content, list):
        return offers + [_build_own(row, name=name, today=today) for row in content]
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--prices {name} holds {content!r}. {_HINT}")
    for pattern, price in content.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
            raise ConfigError(
                f"--prices {name}: the price of {pattern!r} is {price!r}, not a number of dollars. {_HINT}"
            )
        meant = {offer.id for offer in offers if fnmatchcase(offer.id, str(pattern))}
        if not meant:
            raise ConfigError(f"--prices {name}: {pattern!r} means no offer. `solvent offers` lists their ids. {_HINT}")
        offers = [
            replace(offer, usd_per_hour=price * offer.gpus, source=name, date=today) if offer.id in meant else offer
            for offer in offers
        ]
    return offers


def _build_own(row: Any, *, name: str, today: date) -> Offer:
    if not isinstance(row, dict) or not {"gpu", "usd_per_gpu_hour"} <= row.keys() or row.keys() - _OWN.keys():
        raise ConfigError(
            f"--prices {name}: the offer {row!r} needs gpu and usd_per_gpu_hour, and may have "
            f"{', '.join(sorted(_OWN.keys() - {'gpu', 'usd_per_gpu_hour'}))}."
        )
    for key, value in row.items():
        is_good, what = _OWN[key]
        if not is_good(value):
            raise ConfigError(f"--prices {name}: in the offer {row!r}, {key} is {value!r} and must be {what}.")
    gpus = row.get("gpus", 1)
    return build_offer(
        provider=row.get("provider", "own"),
        region=row.get("region", "own"),
        zone=row.get("zone", ""),
        instance=row.get("instance", f"{gpus}x{row['gpu']}"),
        gpu=row["gpu"],
        gpus=gpus,
        kind=row.get("kind", "on-demand"),
        usd_per_hour=row["usd_per_gpu_hour"] * gpus,
        network_gbits=row.get("network_gbits"),
        losses_per_hour=row.get("losses_per_hour"),
        notice_s=row.get("notice_s"),
        max_nodes=row.get("max_nodes"),
        source=name,
        date=row.get("date", today),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_more(value: Any) -> bool:
    return _is_number(value) and value > 0


_OWN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("provider", "region", "zone", "instance"), (_is_text, "a text")),
    "gpu": (_is_text, "the name of a GPU"),
    "gpus": (_is_count, "a whole number of GPUs"),
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "usd_per_gpu_hour": (_is_more, "a number of dollars, more than 0"),
    "network_gbits": (_is_more, "a number of gigabits per second"),
    "losses_per_hour": (_is_number, "a number, at least 0"),
    "notice_s": (_is_number, "a number of seconds"),
    "max_nodes": (_is_count, "a whole number of machines"),
    "date": (lambda value: isinstance(value, date), "a day such as 2026-10-10"),
}
"""What an offer of one's own may say, what that must be, and how that is told."""
