"""Replay recorded or invented fleets of spot nodes: what each policy makes of them, in a fake clock.

The controller and the ledger are those of a real run. TRACE is a CSV file: t_s,event,node or t_s,nodes. With --config
the speed of a node, its price and the time of a recovery are the planner's, for one of its offers; else they are given.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._numbers import count, not_negative, positive
from cluster.cli._runs import add_json, print_json
from elastic.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cluster.simulator.outcome import Outcome
    from cluster.simulator.saving import Saving
    from cluster.simulator.setup import Setup
    from cluster.traces import Fleet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take traces, costs and policies."""
    parser.add_argument("traces", metavar="TRACE", nargs="*", type=Path)
    parser.add_argument(
        "--generate",
        metavar="KEYS",
        action="append",
        default=[],
        help="a fleet by lot, such as nodes=16,hours=168,seed=1",
    )
    parser.add_argument("--min-nodes", type=count, default=1, help="fewest of a world")
    parser.add_argument("--max-nodes", type=count, default=64, help="most of a world")
    parser.add_argument("--gang", type=count, metavar="N", help="also a run that takes N nodes or none")
    parser.add_argument(
        "--save-s", type=not_negative, default=30.0, help="how long a save holds up (all policies but ours)"
    )
    parser.add_argument(
        "--recovery-s", type=not_negative, default=180.0, help="from a loss to the next step (as above)"
    )
    parser.add_argument("--notice-s", type=not_negative, default=0.0, help="before each loss; traces do not tell")
    parser.add_argument("--usd-per-node-hour", type=positive, default=1.0)
    parser.add_argument("--step-node-s", type=positive, default=60.0, help="node-seconds of work in a step")
    deadlines = parser.add_argument_group("deadlines: policies for spot and on-demand over windows drawn by lot")
    deadlines.add_argument("--slack", type=positive, nargs="+", help="deadlines, over the time on on-demand machines")
    deadlines.add_argument("--windows", type=count, default=200, help="for each slack (%(default)s)")
    deadlines.add_argument("--work-h", type=positive, default=8.0, help="hours of work on all machines (%(default)s)")
    deadlines.add_argument(
        "--on-demand-usd-per-node-hour", type=positive, metavar="USD", help="(3 times the spot price)"
    )
    parser.add_argument("--config", metavar="CONFIG", help="plan it: speed, price and recovery of a node of --offer")
    parser.add_argument("--offer", metavar="ID", help="of `solvent offers`, for --config")
    parser.add_argument("--plot", metavar="HTML", type=Path, help="write pictures there")
    parser.add_argument("--seed", type=int, default=0, help="who goes where a trace does not say")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Play every fleet under every policy, and print what came of it."""
    from cluster.simulator.generator import generate_fleet, parse_weather
    from cluster.simulator.outcome import build_savings, compare
    from cluster.simulator.setup import Setup
    from cluster.traces import load_fleet

    if not args.traces and not args.generate:
        raise ConfigError("simulate needs a fleet: give TRACE files, or --generate nodes=16,hours=168.")
    if args.min_nodes > args.max_nodes:
        raise ConfigError(f"--min-nodes {args.min_nodes} must be at most --max-nodes {args.max_nodes}.")
    fleets = [load_fleet(path, seed=args.seed) for path in args.traces]
    fleets += [generate_fleet(parse_weather(text)) for text in args.generate]
    for fleet in fleets:
        if not fleet.node_hours:
            raise DataError(f"{fleet.name} has no node at any time, so nothing could train. Give another fleet.")
    if args.slack:
        return _study_deadlines(args, fleets)
    savings = build_savings(save_s=args.save_s, recovery_s=args.recovery_s)
    setup = Setup(
        saving=savings[-1],
        world_sizes=tuple(range(args.min_nodes, args.max_nodes + 1)),
        usd_per_node_hour=args.usd_per_node_hour,
        step_node_s=args.step_node_s,
        notice_s=args.notice_s,
    )
    speed = 0.0
    if args.config:
        setup, savings, speed = _plan(args, setup, savings)
    played = [(fleet, compare(fleet, setup, savings, gang=args.gang, tokens_per_node_s=speed)) for fleet in fleets]
    if args.plot:
        from cluster.simulator.plot import draw_page

        try:
            args.plot.write_text(draw_page(played), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--plot {args.plot} cannot be written ({error.strerror}). Give another path.") from error
    if args.json:
        rows = {fleet.name: {o.policy: o.to_row() for o in outcomes} for fleet, outcomes in played}
        only: Any = next(iter(rows.values())) if len(rows) == 1 else {}
        print_json({"traces": rows, **only})
        return 0
    for fleet, outcomes in played:
        print(f"{fleet.name}: {fleet.node_hours:,.0f} node-hours in {fleet.end_s / 3600:,.1f} h")
        heads = f"{'goodput':>8} {'fleet':>7} {'world':>7} {'USD':>10} {'losses':>6} {'redone':>8}  USD/Mtok"
        print(f"  {'policy':12} {heads}")
        for outcome in outcomes:
            print(_format(outcome))
    return 0


def _study_deadlines(args: argparse.Namespace, fleets: "list[Fleet]") -> int:
    """Print what the policies for deadlines cost, and return 1 if one was missed."""
    from cluster.deadlines.study import Terms, study

    if min(args.slack) <= 1:
        raise ConfigError(f"--slack {min(args.slack):g} must be more than 1: the time on on-demand machines alone.")
    terms = Terms(
        work_h=args.work_h,
        spot_usd_per_hour=args.usd_per_node_hour,
        on_demand_usd_per_hour=args.on_demand_usd_per_node_hour or 3 * args.usd_per_node_hour,
    )
    levels = [fleet.get_levels() for fleet in fleets]
    results = [study(levels, slack=slack, windows=args.windows, terms=terms, seed=args.seed) for slack in args.slack]
    if args.json:
        print_json({"deadlines": [result.to_row() for result in results]})
    for result in [] if args.json else results:
        costs = "  ".join(f"{name} {usd:.3f}" for name, usd in result.usd_per_node_hour.items())
        print(f"slack {result.slack:g}, {result.windows} windows: {sum(result.missed.values())} missed")
        print(f"  USD per node-hour of work: {costs}")
        print(f"  the chooser costs {result.chooser_over_best:.4f} times the best single policy: {dict(result.picked)}")
    return 1 if any(sum(result.missed.values()) for result in results) else 0


def _format(outcome: "Outcome") -> str:
    tally, cost = outcome.tally, outcome.usd_per_mtoken
    shares = f"{outcome.goodput:8.1%} {outcome.fleet_share:7.1%} {outcome.world_share:7.1%}"
    redone = tally.redone_node_s / outcome.step_node_s
    price = "" if cost is None else f"{cost:.4f}"
    return f"  {outcome.policy:12} {shares} {tally.usd:10,.2f} {tally.losses:6} {redone:8,.0f}  {price}"


def _plan(
    args: argparse.Namespace, setup: "Setup", savings: "tuple[Saving, ...]"
) -> "tuple[Setup, tuple[Saving, ...], float]":
    """Return the setup with what the planner says of one node of an offer, and its tokens per second."""
    from dataclasses import replace

    from cluster.catalog.load import get_cache, load_catalog
    from cluster.planner.candidates import Evaluator
    from elastic.config_load import load

    offers = {offer.id: offer for offer in load_catalog(cache=get_cache()).offers}
    if args.offer not in offers:
        said = f"--offer {args.offer} is not one" if args.offer else "--config needs an --offer"
        raise ConfigError(f"{said}. Give an id that `solvent offers` prints.")
    offer, config = offers[args.offer], load(args.config, [])
    nodes = max(1, config.cluster.max_workers // offer.gpus)
    candidate = Evaluator(config).evaluate(offer, nodes)
    if not candidate.fits or candidate.goodput is None:
        raise ConfigError(f"--config {args.config} on {nodes} x {args.offer}: {candidate.reason}.")
    speed = candidate.tokens_per_s / nodes
    outage_s, ours = candidate.goodput.outage_s, savings[-1]  # from step to step: leaving is a part of it
    ours = replace(ours, recovery_s=max(0.0, outage_s - ours.leave_s), planned_s=max(0.0, outage_s - ours.park_s))
    setup = replace(
        setup,
        usd_per_node_hour=offer.usd_per_hour,
        step_node_s=config.train.global_batch * config.data.seq_len / speed,
        notice_s=args.notice_s or 0.0,
    )
    return setup, (*savings[:-1], ours), speed
