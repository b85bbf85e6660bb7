"""What `plan`, and `--plan` of the verbs that start a run, share: offers in, a choice out, told to people."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

from cluster.cli._numbers import positive
from cluster.cli.offers import add_catalog
from elastic.config import RunConfig
from elastic.errors import ConfigError, NoPlanError

if TYPE_CHECKING:
    from cluster.catalog.load import Catalog
    from cluster.catalog.offers import Offer
    from cluster.planner.candidates import Candidate, Known
    from cluster.planner.choice import Choice, Limits


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Declare what a plan may take, and from which offers it chooses."""
    parser.add_argument("--deadline-h", type=positive, metavar="H", help="hours it may take (else budget.max_hours)")
    parser.add_argument("--budget-usd", type=positive, metavar="USD", help="dollars it may cost (else budget.max_usd)")
    parser.add_argument("--gpu", help="only this kind of GPU")
    parser.add_argument("--kind", choices=["on-demand", "spot", "bid", "reserved"], help="only this way to pay")
    parser.add_argument("--provider", help="only this one")
    add_catalog(parser)


def get_limits(config: RunConfig, args: argparse.Namespace, *, used_h: float = 0.0, used_usd: float = 0.0) -> "Limits":
    """Return what the plan may take: what is asked for, else what the run's own budget leaves.

    Raises:
        NoPlanError: it leaves nothing.
    """
    from cluster.planner.choice import Limits

    hours, usd = getattr(args, "deadline_h", None), getattr(args, "budget_usd", None)
    if hours is None and config.budget.max_hours:
        hours = _leave("budget.max_hours", config.budget.max_hours, used_h, "h have passed since the run began")
    if usd is None and config.budget.max_usd:
        usd = _leave("budget.max_usd", config.budget.max_usd, used_usd, "USD are spent")
    return Limits(hours=hours, usd=usd)


def _leave(key: str, limit: float, used: float, what: str) -> float:
    if used >= limit:
        raise NoPlanError(f"{key}={limit:g} is over: {used:.2f} {what}. Raise it to plan what is left.")
    return limit - used


def load_offers(args: argparse.Namespace) -> "tuple[Catalog, list[Offer]]":
    """Return the catalog, and the offers that the filters leave.

    GPUs on which nothing of ours was ever run are left out, unless they are asked for.
    """
    from cluster.catalog.gpus import find_spec, get_spec
    from cluster.catalog.load import get_cache, load_catalog

    catalog = load_catalog(
        prices=getattr(args, "prices", None), catalogs=tuple(getattr(args, "catalog", ())), cache=get_cache()
    )
    gpu = get_spec(args.gpu).name if getattr(args, "gpu", None) else None
    kind, provider = getattr(args, "kind", None), getattr(args, "provider", None)
    offers = [
        offer
        for offer in catalog.offers
        if (gpu == offer.gpu if gpu else (spec := find_spec(offer.gpu)) is None or spec.link != "infinity-fabric")
        and kind in (None, offer.kind)
        and provider in (None, offer.provider)
    ]
    if not offers:
        filters = {"--gpu": gpu, "--kind": kind, "--provider": provider}
        said = " ".join(f"{option} {value}" for option, value in filters.items() if value)
        providers = ", ".join(sorted({offer.provider for offer in catalog.offers}))
        if not providers:
            raise ConfigError(f"--catalog {' '.join(args.catalog)} has no offer with a price. Give another file.")
        raise ConfigError(
            f"{said} leaves none of {len(catalog.offers)} offers. Ask for another; their providers are: {providers}."
        )
    return replace(catalog, offers=tuple(offers)), offers


def make_choice(
    config: RunConfig, args: argparse.Namespace, known: "Known", *, used_h: float = 0.0, used_usd: float = 0.0
) -> "tuple[Catalog, Choice]":
    """Choose.

    Raises:
        NoPlanError: nothing keeps to the limits.
    """
    from cluster.planner.choice import choose

    catalog, offers = load_offers(args)
    limits = get_limits(config, args, used_h=used_h, used_usd=used_usd)
    return catalog, choose(config, offers, limits=limits, known=known)


def get_known() -> "Known":
    """Return what was measured on GPUs before."""
    from cluster.planner.calibration import get_file, load_scales
    from cluster.planner.candidates import Known

    return Known(scales=load_scales(get_file()))


def plan_first(config: RunConfig, args: argparse.Namespace) -> None:
    """Tell the plan on stderr before a run is started or rendered.

    Raises:
        NoPlanError: nothing keeps to the limits; nothing is started then.
    """
    catalog, choice = make_choice(config, args, get_known())
    for line in describe(choice, catalog, top=3):
        print(line, file=sys.stderr)


def describe(choice: "Choice", catalog: "Catalog", *, top: int) -> Iterable[str]:
    """Yield the plan for people."""
    chosen = choice.chosen
    yield f"{'USD':>12} {'USD/Mtok':>9} {'hours':>9} {'GPUs':>5} {'GiB':>6} {'goodput':>7}  offer"
    shown = [chosen, *(c for c in choice.candidates if c.fits and c.offer.id != chosen.offer.id)][:top]
    for candidate in shown:
        yield _format(candidate) + ("   <- chosen" if candidate is chosen else "")
    yield ""
    yield f"chosen: {chosen.nodes} x {chosen.offer.id}: {choice.why}. {_capitalise(chosen.reason)}."
    if chosen.memory is not None and chosen.gpu is not None and chosen.goodput is not None:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in chosen.memory.gib.items())
        yield (
            f"memory: {chosen.memory.peak_gib:.1f} of {chosen.gpu.usable_gib:.1f} GiB a GPU ({parts}) when "
            f"{chosen.memory.moment}; {chosen.host_gib:.0f} GiB of host memory a node"
        )
        yield (
            f"losses: {chosen.goodput.losses_per_hour:.2g} an hour, {chosen.goodput.outage_s:.1f} s each; a checkpoint "
            f"every {chosen.goodput.interval_s:.0f} s; {chosen.goodput.share:.1%} of the time is progress"
        )
    for change in choice.changes[:4]:
        yield f"would save {change.usd_saved:,.2f} USD and {change.hours_saved:,.1f} h: {change.change}"
    left_out = [c for c in choice.candidates if not c.fits]
    if left_out:
        yield f"{len(left_out)} offers cannot be; the first: {left_out[0].offer.id}: {left_out[0].reason}"
    yield f"{catalog.describe_age(date.today())}; list prices, without taxes and traffic. All of it is an estimate."


def _format(candidate: "Candidate") -> str:
    share = candidate.goodput.share if candidate.goodput else 0.0
    gib = candidate.memory.peak_gib if candidate.memory else 0.0
    return (
        f"{candidate.usd:12,.2f} {candidate.usd_per_mtoken:9.4f} {candidate.hours:9,.1f} {candidate.gpus:5} "
        f"{gib:6.1f} {share:7.1%}  {candidate.offer.id} ({candidate.offer.gpu}, {candidate.offer.date})"
    )


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
