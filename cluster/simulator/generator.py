"""Fleets by lot: nodes live and stay away for heavy-tailed times, go in batches, and come in parts. Seeded; pure.

Lives and gaps are lognormal. Source of the shape: counted in the traces of uclasystem/bamboo@80809293, whose times have
coefficients of variation of 2.4 to 3.2 (an exponential one has 1), and of whose losses on AWS p3 77 % took more than
one node.
"""

import heapq
import math
from dataclasses import dataclass
from random import Random

from cluster.traces import Change, Fleet
from elastic.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How a fleet behaves."""

    nodes: int = 16
    """That are asked for."""
    hours: float = 168.0
    mean_up_h: float = 8.0
    mean_down_h: float = 1.0
    variation: float = 2.8
    """Standard deviation over mean, of lives and of gaps."""
    batch_share: float = 0.5
    """Of losses, those that take others along."""
    batch_mean: float = 3.0
    """Nodes that such a loss takes, on average, itself included."""
    seed: int = 0


def parse_weather(text: str) -> Weather:
    """Read `nodes=16,hours=168,seed=1`.

    Raises:
        DataError: a key is not known, or a value cannot be.
    """
    values: dict[str, float] = {}
    known = {name: type(getattr(Weather(), name)) for name in Weather.__dataclass_fields__}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            values[key] = known[key](value)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"--generate {text}: {part!r} cannot be. Give numbers for any of: {', '.join(known)}."
            ) from error
    weather = Weather(**values)  # pyright: ignore[reportArgumentType] # each has the type of its default
    positive = (weather.nodes, weather.hours, weather.mean_up_h, weather.mean_down_h, weather.variation)
    if (
        not all(0 < number < math.inf for number in positive)
        or not 0 <= weather.batch_share <= 1
        or weather.batch_mean < 1
    ):
        raise DataError(f"--generate {text}: numbers must be positive, batch_share at most 1, batch_mean at least 1.")
    return weather


def generate_fleet(weather: Weather) -> Fleet:
    """Return a fleet; the same for the same seed."""
    lots = Random(weather.seed)
    sigma = math.sqrt(math.log(1 + weather.variation**2))

    def draw_s(mean_h: float) -> float:
        return 3600 * mean_h * math.exp(lots.gauss(0.0, sigma) - sigma**2 / 2)

    end_s = weather.hours * 3600
    due = [
        (0.0 if lots.random() < _share_up(weather) else draw_s(weather.mean_down_h), place, -1)
        for place in range(weather.nodes)
    ]
    heapq.heapify(due)
    life = [0] * weather.nodes
    up: set[int] = set()
    by_time: dict[float, tuple[list[str], list[str]]] = {}
    while due and due[0][0] < end_s:
        time_s, place, stamp = heapq.heappop(due)
        added, removed = by_time.setdefault(time_s, ([], []))
        if stamp < 0:
            life[place] += 1
            up.add(place)
            added.append(f"n{place}.{life[place]}")
            heapq.heappush(due, (time_s + draw_s(weather.mean_up_h), place, life[place]))
            continue
        if place not in up or stamp != life[place]:  # another one took it along
            continue
        gone = [place]
        if lots.random() < weather.batch_share:
            others = sorted(up - {place})
            more = 1 + int(lots.expovariate(1 / max(weather.batch_mean - 2, 1e-9))) if weather.batch_mean > 2 else 1
            gone += lots.sample(others, min(more, len(others)))
        for lost in gone:
            up.discard(lost)
            removed.append(f"n{lost}.{life[lost]}")
            heapq.heappush(due, (time_s + draw_s(weather.mean_down_h), lost, -1))
    changes = tuple(
        Change(time_s=time_s, added=tuple(a), removed=tuple(r)) for time_s, (a, r) in sorted(by_time.items()) if a or r
    )
    return Fleet(name=f"generated-{weather.seed}", changes=changes, end_s=end_s)


def _share_up(weather: Weather) -> float:
    return weather.mean_up_h / (weather.mean_up_h + weather.mean_down_h)
