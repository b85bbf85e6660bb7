"""Show what can be rented and what it costs, each price with its source and its day.

Prices are those that ship with Solvent, or of the last --refresh; --prices names a YAML file that wins over them.
"""

import argparse
import os
import sys
from dataclasses import asdict, replace
from datetime import date

from cluster.cli._runs import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take filters, and where prices are from."""
    parser.add_argument("--gpu", help="only this kind of GPU")
    parser.add_argument("--kind", choices=["on-demand", "spot", "bid", "reserved"], help="only this way to pay")
    parser.add_argument("--provider", help="only this one")
    parser.add_argument("--refresh", action="store_true", help="ask for today's prices first (extra `prices`)")
    parser.add_argument("--csv", action="store_true", help="print a catalog that --catalog reads")
    add_catalog(parser)
    add_json(parser)


def add_catalog(parser: argparse.ArgumentParser) -> None:
    """Declare where prices are from, for `load`."""
    parser.add_argument("--prices", metavar="FILE", help="YAML with prices or offers of your own, which win")
    parser.add_argument(
        "--catalog",
        metavar="CSV",
        action="append",
        default=[],
        help="offers instead of ours: SkyPilot's vms.csv or ours",
    )


def run(args: argparse.Namespace) -> int:
    """Print the offers, the cheapest GPU first."""
    from cluster.catalog.gpus import get_spec
    from cluster.catalog.load import get_cache, keep, load_catalog
    from cluster.catalog.offers import dump_csv

    today = date.today()
    if args.refresh:
        from cluster.catalog.gpuhunt import fetch_offers

        keep(fetch_offers(day=today, folder=os.environ.get("GPUHUNT_CATALOG_DIR", "")), get_cache())
    catalog = load_catalog(prices=args.prices, catalogs=tuple(args.catalog), cache=get_cache())
    gpu = get_spec(args.gpu).name if args.gpu else None
    offers = [
        offer
        for offer in sorted(catalog.offers, key=lambda offer: (offer.usd_per_gpu_hour, offer.id))
        if gpu in (None, offer.gpu) and args.kind in (None, offer.kind) and args.provider in (None, offer.provider)
    ]
    left_out = "; ".join(f"left out: {number} x {reason}" for reason, number in catalog.left_out.items())
    if args.json:
        rows = [
            {"id": offer.id, **asdict(offer), "date": str(offer.date), "usd_per_gpu_hour": offer.usd_per_gpu_hour}
            for offer in offers
        ]
        as_of = str(catalog.as_of) if catalog.as_of else None
        print_json({"offers": rows, "prices_as_of": as_of, "left_out": dict(catalog.left_out)})
        return 0
    if args.csv:
        print(dump_csv(offers), end="")
        return 0
    print(f"{'USD/GPU-h':>9}  {'GPU':15} {'GPUs':>4}  {'as of':10}  id")
    for offer in offers:
        print(f"{offer.usd_per_gpu_hour:9.3f}  {offer.gpu:15} {offer.gpus:4}  {offer.date}  {offer.id}")
    age = replace(catalog, offers=tuple(offers)).describe_age(today)
    print(f"{len(offers)} offers; {age}{'; ' + left_out if left_out else ''}", file=sys.stderr)
    return 0
