"""What a GPU-hour costs here, and what a million tokens cost in the end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastic.config import CostConfig
from elastic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD per GPU-hour, by the `solvent-offer` label of a node."""

    usd_per_gpu_hour: float = 0.0
    """For nodes without a label, and for offers that the file does not name."""
    by_offer: Mapping[str, float] = field(default_factory=dict[str, float])

    def get_usd_per_gpu_hour(self, offer: str | None) -> float:
        """Return the price of one GPU of a node with this label."""
        return self.by_offer.get(offer or "", self.usd_per_gpu_hour)


def load_prices(config: CostConfig) -> Prices:
    """Read the prices that the configuration names.

    Raises:
        ConfigError: the price file is missing, is not YAML, or holds something else than prices.
    """
    if not config.price_file:
        return Prices(usd_per_gpu_hour=config.usd_per_gpu_hour)
    found = f"cost.price_file={config.price_file!r}"
    hint = "Write one line per offer, such as `aws-g5-spot: 0.41`."
    try:
        content: Any = yaml.safe_load(Path(config.price_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{found} cannot be read ({error.strerror}). Correct the path, or leave it empty.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{found} is not YAML: {' '.join(str(error).split())}. {hint}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{found} must map offers to USD per GPU-hour, but it holds {content!r}. {hint}")
    by_offer: dict[str, float] = {}
    for offer, price in content.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
            raise ConfigError(f"{found}: the price of {offer!r} is {price!r}, not a number of dollars. {hint}")
        by_offer[str(offer)] = float(price)
    return Prices(usd_per_gpu_hour=config.usd_per_gpu_hour, by_offer=by_offer)


def get_usd_per_mtoken(usd: float, tokens: int) -> float | None:
    """Return dollars per million tokens; None before the first token."""
    return usd / tokens * 1e6 if tokens else None
