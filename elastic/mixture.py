"""How many samples of each source a run has taken by any point: closed form, so that no resume counts through the past.

Samples of a run are numbered over all its steps. Among the first n of a phase, sources share by the weights as follows:
the heaviest source gets its share of n, rounded; the next one its share of the rest, rounded; and so on. Each count
never falls as n grows, they sum to n, and none is further than (1 + 1/1 + 1/2 + ... + 1/(k-1)) / 2 from weight * n, k
being the number of sources: what rounding has left over after source j reaches source m as weight_m / (all weights from
j + 1 on), which is at most 1 / (m - j) because the weights fall. All arithmetic is on integers of any size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from elastic.config import DataConfig, PhaseConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Weights that hold from a sample of the run on; integers whose ratios are those of the configuration."""

    first_sample: int
    weights: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources and, in the order of their names here, their weights from phase to phase."""

    names: tuple[str, ...]
    phases: tuple[Phase, ...]
    """In the order of their first samples; that of the first one is 0."""

    def count(self, num_samples: int) -> tuple[int, ...]:
        """Return how many of the first so many samples of a run are from each source."""
        totals = [0] * len(self.names)
        ends = [phase.first_sample for phase in self.phases[1:]]
        for phase, end in zip(self.phases, [*ends, num_samples], strict=True):
            inside = min(end, num_samples) - phase.first_sample
            if inside > 0:
                totals = [total + one for total, one in zip(totals, share_out(inside, phase.weights), strict=True)]
        return tuple(totals)

    def describe(self) -> dict[str, Any]:
        """Return what decides which source each sample is from, in the simplest form, as JSON."""
        phases = [[phase.first_sample, _reduce(self.names, phase.weights)] for phase in self.phases]
        return {"phases": [phases[0], *(new for old, new in pairwise(phases) if old[1] != new[1])]}


def cut_description(description: Mapping[str, Any] | None, num_samples: int) -> Mapping[str, Any] | None:
    """Return what `Mixture.describe` says of the first so many samples."""
    return description and {"phases": [phase for phase in description["phases"] if phase[0] < max(num_samples, 1)]}


def share_out(num_samples: int, weights: Sequence[int]) -> list[int]:
    """Return each source's part of the first so many samples of a phase; see the top of this file."""
    counts, rest, rest_weight = [0] * len(weights), num_samples, sum(weights)
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        weight = weights[index]
        if not weight:
            break
        counts[index] = (2 * rest * weight + rest_weight) // (2 * rest_weight)
        rest -= counts[index]
        rest_weight -= weight
    return counts


def build_mixture(config: RunConfig) -> Mixture | None:
    """Return the mixture of a configuration; None: it has one source, `data.path`."""
    data = config.data
    if not data.sources:
        return None
    names = tuple(data.sources)
    weights = [{name: source.weight for name, source in data.sources.items()}]
    firsts = [0]
    for first, changed in sorted((_get_first(phase, config), phase.weights) for phase in data.phases.values()):
        firsts.append(first)
        weights.append({**dict.fromkeys(names, 0.0), **changed})
    phases = (
        Phase(first_sample=first, weights=_to_integers([one[name] for name in names]))
        for first, one in zip(firsts, weights, strict=True)
    )
    return Mixture(names=names, phases=tuple(phases))


def get_paths(data: DataConfig) -> dict[str, str]:
    """Return the prepared folders by the keys that name them."""
    if not data.sources:
        return {"data.path": data.path}
    return {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}


def describe_paths(data: DataConfig) -> str:
    """Return the keys of the prepared folders with their values, for a message."""
    return ", ".join(f"{key}={path!r}" for key, path in get_paths(data).items())


def _get_first(phase: PhaseConfig, config: RunConfig) -> int:
    if phase.from_step:
        return (phase.from_step - 1) * config.train.global_batch
    return math.ceil(phase.from_tokens / config.data.seq_len)


def _to_integers(weights: Sequence[float]) -> tuple[int, ...]:
    """Return integers with these ratios: 0.7 is seven tenths, not the nearest binary fraction."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * unit) for weight in exact)


def _reduce(names: Sequence[str], weights: Sequence[int]) -> Mapping[str, int]:
    divisor = math.gcd(*weights) or 1
    return {name: weight // divisor for name, weight in sorted(zip(names, weights, strict=True)) if weight}
