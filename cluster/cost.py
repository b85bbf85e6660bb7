"""What a GPU-hour costs here, and what a million tokens cost in the end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastic.config import CostConfig
from elastic.errors import ConfigError
from elastic.paths import expand_home


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
        content: Any = yaml.safe_load(Path(expand_home(config.price_file)).read_text(encoding="utf-8"))
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


class KnownPrices:
    """Prices as their file says now, or as it said last: what a node costs must not keep it from training.

    Args:
        say: takes a line for people when the file cannot be used, and when it can again.
    """

    def __init__(self, config: CostConfig, *, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._known = Prices(usd_per_gpu_hour=config.usd_per_gpu_hour)
        self._problem = ""

    def look(self) -> Prices:
        """Return the prices that are known now."""
        try:
            self._known, problem = load_prices(self._config), ""
        except ConfigError as error:
            problem = str(error)
        if problem and problem != self._problem:
            known = f"those of {len(self._known.by_offer)} offers that it named last" if self._known.by_offer else ""
            others = f"cost.usd_per_gpu_hour={self._config.usd_per_gpu_hour:g}"
            self._say(f"prices: {problem} New nodes are booked at {known or others} until it can be read.")
        elif self._problem and not problem:
            self._say(f"prices: cost.price_file={self._config.price_file!r} can be read again")
        self._problem = problem
        return self._known


def get_usd_per_mtoken(usd: float, tokens: int) -> float | None:
    """Return dollars per million tokens; None before the first token."""
    return usd / tokens * 1e6 if tokens else None
