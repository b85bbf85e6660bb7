"""The best way to run it, why, what one change would buy, and what would have to change if there is none. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.catalog.offers import Offer
from cluster.planner.candidates import Candidate, Evaluator, Known, get_node_counts
from elastic import plugins
from elastic.config import RunConfig
from elastic.errors import ConfigError, NoPlanError

_AS_CHEAP = 1.03
"""Within this of the least dollars, the fastest is taken: estimates are no better."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan may take."""

    hours: float | None = None
    usd: float | None = None

    def allow(self, candidate: Candidate) -> bool:
        """Tell whether a candidate keeps to them."""
        in_time = self.hours is None or candidate.hours <= self.hours
        return candidate.fits and in_time and (self.usd is None or candidate.usd <= self.usd)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of the configuration, and what it makes of the chosen way."""

    change: str
    """As it is typed."""
    candidate: Candidate
    usd_saved: float
    hours_saved: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found."""

    candidates: tuple[Candidate, ...]
    """The best of every offer that can be, the cheapest first; then those that cannot be."""
    chosen: Candidate
    why: str
    changes: tuple[Change, ...]


def choose(
    config: RunConfig, offers: Sequence[Offer], *, limits: Limits | None = None, known: Known | None = None
) -> Choice:
    """Return the cheapest way within the limits, the fastest of about as cheap ones.

    Raises:
        NoPlanError: there is none. It says the smallest change that would make one.
        ConfigError: nobody has measured what the strategy needs.
    """
    if plugins.read_constant("elastic.strategies", config.strategy, "CAN_BE_PLANNED") is False:
        raise ConfigError(
            f"strategy={config.strategy} cannot be planned: nobody has measured what it needs, and a guess may not fit "
            "what you rent. Plan with strategy=fsdp2, which needs less, and try the other one for an hour."
        )
    limits = limits or Limits()
    candidates = evaluate_all(config, offers, known=known)
    allowed = [candidate for candidate in candidates if limits.allow(candidate)]
    if not allowed:
        raise NoPlanError(explain_none(config, offers, candidates, limits=limits, known=known))
    least = min(allowed, key=lambda candidate: candidate.usd)
    about = [candidate for candidate in allowed if candidate.usd <= _AS_CHEAP * least.usd]
    chosen = min(about, key=lambda candidate: (candidate.hours, candidate.usd))
    return Choice(
        candidates=tuple(_keep_best(candidates, limits)),
        chosen=chosen,
        why=_explain(chosen, least, allowed, limits),
        changes=tuple(_try_changes(config, chosen, known=known)),
    )


def evaluate_all(config: RunConfig, offers: Iterable[Offer], *, known: Known | None = None) -> list[Candidate]:
    """Return every offer with every number of machines that the run may use."""
    evaluator = Evaluator(config, known)
    candidates: list[Candidate] = []
    for offer in offers:
        counts = get_node_counts(config, offer)
        candidates += [evaluator.evaluate(offer, nodes) for nodes in counts]
        if not counts:
            least, most = config.cluster.min_workers, config.cluster.max_workers
            reason = f"machines of {offer.gpus} GPU(s) cannot make a world of {least} to {most} that the strategy takes"
            candidates.append(Candidate(offer=offer, nodes=1, gpu=None, fits=False, reason=reason))
    return candidates


def _keep_best(candidates: Iterable[Candidate], limits: Limits) -> list[Candidate]:
    """Return one candidate per offer: the cheapest that is allowed, else the cheapest that fits, else any."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        rank = _rank(candidate, limits)
        if candidate.offer.id not in best or rank < _rank(best[candidate.offer.id], limits):
            best[candidate.offer.id] = candidate
    return sorted(best.values(), key=lambda candidate: _rank(candidate, limits))


def _rank(candidate: Candidate, limits: Limits) -> tuple[bool, bool, float, float]:
    return (not limits.allow(candidate), not candidate.fits, candidate.usd, candidate.hours)


def _explain(chosen: Candidate, least: Candidate, allowed: Sequence[Candidate], limits: Limits) -> str:
    what = f"the cheapest of {len(allowed)} ways"
    if chosen is not least:
        what = f"the fastest of those within {_AS_CHEAP - 1:.0%} of the cheapest of {len(allowed)} ways"
    within = [f"{limits.hours:g} h"] if limits.hours is not None else []
    within += [f"{limits.usd:g} USD"] if limits.usd is not None else []
    return what + (f" within {' and '.join(within)}" if within else "")


# ---- changes

_Alter = Callable[[RunConfig], RunConfig]


def _list_changes(config: RunConfig) -> list[tuple[str, _Alter]]:
    """Return changes of one key each that somebody might make, those that change least in what is computed first."""
    train = config.train

    def with_micro_batch(size: int) -> _Alter:
        return lambda c: replace(c, train=replace(c.train, micro_batch=size))

    sizes = [size for size in (train.micro_batch // 2, train.micro_batch // 4, 1) if 0 < size < train.micro_batch]
    sizes += [train.micro_batch * 2] if train.micro_batch * 2 <= train.global_batch else []
    changes: list[tuple[str, _Alter]] = [
        (f"train.micro_batch={size}", with_micro_batch(size)) for size in dict.fromkeys(sizes)
    ]
    if not config.compile:
        changes.append(("compile=true", lambda c: replace(c, compile=True)))
    for mode in ("none", "selective", "full"):
        if mode != config.recompute:
            changes.append((f"recompute={mode}", lambda c, mode=mode: replace(c, recompute=mode)))
    if config.strategy not in ("auto", "fsdp2"):
        changes.append(("strategy=fsdp2", lambda c: replace(c, strategy="fsdp2", shard_size=0)))
    if config.checkpoint.every_steps:
        changes.append(
            ("checkpoint.every_steps=0", lambda c: replace(c, checkpoint=replace(c.checkpoint, every_steps=0)))
        )
    if config.checkpoint.memory != "peer":
        changes.append(
            ("checkpoint.memory=peer", lambda c: replace(c, checkpoint=replace(c.checkpoint, memory="peer")))
        )
    for precision in ("bf16", "fp16", "fp8"):
        if precision != config.precision and (precision != "fp8" or config.compile):
            changes.append((f"precision={precision}", lambda c, p=precision: replace(c, precision=p)))
    return changes


def _alter(config: RunConfig, alter: _Alter) -> RunConfig | None:
    try:
        return alter(config)
    except ConfigError:  # two keys that do not go together
        return None


def _try_changes(config: RunConfig, chosen: Candidate, *, known: Known | None) -> Iterable[Change]:
    """Return what single changes would make of the chosen way: those that fit and save something, the best first."""
    found: list[Change] = []

    def note(change: str, candidate: Candidate) -> None:
        saved, hours = chosen.usd - candidate.usd, chosen.hours - candidate.hours
        if candidate.fits and (saved > 0.005 * chosen.usd or hours > 0.02 * chosen.hours):
            found.append(Change(change=change, candidate=candidate, usd_saved=saved, hours_saved=hours))

    for change, alter in _list_changes(config):
        other = _alter(config, alter)
        if other is not None:
            note(change, Evaluator(other, known).evaluate(chosen.offer, chosen.nodes))
    for nodes in get_node_counts(config, chosen.offer):
        if nodes < chosen.nodes:
            note(f"{nodes} x {chosen.offer.instance} instead of {chosen.nodes}", _again(config, chosen, nodes, known))
            break
    return sorted(found, key=lambda change: -change.usd_saved)


def _again(config: RunConfig, chosen: Candidate, nodes: int, known: Known | None) -> Candidate:
    return Evaluator(config, known).evaluate(chosen.offer, nodes)


# ---- no plan


def explain_none(
    config: RunConfig,
    offers: Sequence[Offer],
    candidates: Sequence[Candidate],
    *,
    limits: Limits,
    known: Known | None,
) -> str:
    """Say why there is no plan, and the smallest changes that would make one, each alone."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    remedies: list[str] = []
    if fitting:
        remedies += _relax(fitting, limits)
        best = min(fitting, key=lambda candidate: candidate.hours)
        cheapest = min(fitting, key=lambda candidate: candidate.usd)
        why = (
            f"the fastest way ({_name(best)}) takes {best.hours:,.1f} h, the cheapest ({_name(cheapest)}) costs "
            f"{cheapest.usd:,.2f} USD"
        )
    else:
        why = _explain_nothing_fits(candidates)
    for change, alter in _list_changes(config):
        other = _alter(config, alter)
        if other is not None and any(limits.allow(c) for c in evaluate_all(other, offers, known=known)):
            remedies.append(change)
            break
    remedies += _add_workers(config, offers, limits=limits, known=known)
    asked = [f"--deadline-h {limits.hours:g}"] if limits.hours is not None else []
    asked += [f"--budget-usd {limits.usd:g}"] if limits.usd is not None else []
    what = f"none of {len(offers)} offers will do"
    if asked:
        what = f"no offer of {len(offers)} meets {' and '.join(asked)}"
    hint = "No single change that we know helps"
    if remedies:
        hint = f"Any one of these makes a plan: {'; '.join(remedies)}"
    return f"{what}: {why.rstrip('.')}. {hint}."


def _relax(fitting: Sequence[Candidate], limits: Limits) -> list[str]:
    """Return the least that a limit must be raised to, the other one kept."""
    remedies: list[str] = []
    if limits.hours is not None:
        others = [candidate.hours for candidate in fitting if Limits(usd=limits.usd).allow(candidate)]
        if others:
            remedies.append(f"--deadline-h {_round_up(min(others))}")
    if limits.usd is not None:
        others = [candidate.usd for candidate in fitting if Limits(hours=limits.hours).allow(candidate)]
        if others:
            remedies.append(f"--budget-usd {_round_up(min(others))}")
    return remedies


def _round_up(value: float) -> str:
    digits = 10 ** max(0, math.floor(math.log10(value)) - 2) if value > 100 else 1
    return f"{math.ceil(value / digits) * digits:g}" if value > 1 else f"{math.ceil(100 * value) / 100:g}"


def _explain_nothing_fits(candidates: Sequence[Candidate]) -> str:
    known = [(c.memory.peak_gib - c.gpu.usable_gib, c) for c in candidates if c.memory and c.gpu]
    if not known:
        return candidates[0].reason if candidates else "there are no offers"
    nearest = min(known, key=lambda pair: pair[0])[1]
    return f"the nearest is {_name(nearest)}: {nearest.reason}"


def _add_workers(config: RunConfig, offers: Sequence[Offer], *, limits: Limits, known: Known | None) -> list[str]:
    """Return the least multiple of the workers that would do, if one up to 16 times does."""
    most = config.cluster.max_workers
    for factor in (2, 4, 8, 16):
        workers = most * factor
        if workers > config.train.global_batch:
            break
        other = _alter(config, lambda c, w=workers: replace(c, cluster=replace(c.cluster, max_workers=w)))
        if other is not None and any(limits.allow(c) for c in evaluate_all(other, offers, known=known)):
            return [f"cluster.max_workers={workers}"]
    return []


def _name(candidate: Candidate) -> str:
    return f"{candidate.nodes} x {candidate.offer.id}"
