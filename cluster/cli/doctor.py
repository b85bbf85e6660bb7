"""Say what is wrong with this machine, and whose it is.

With CONFIG also whether it has the memory for that run's snapshots. Every line is ok, warn or fail; what is not ok
says what to do. The exit code is 1 if something fails.
"""

import argparse
import dataclasses
from pathlib import Path

from cluster.cli._runs import RUNS, add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the place that runs will need, and the run."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="the run that the machine is for")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--storage", default=str(RUNS), help="where runs would be written (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line per check, and return 1 if one fails."""
    from cluster.doctor import examine
    from cluster.runtime.node.start_host import SUBREAPER
    from cluster.runtime.ray.ray_token import get_default_path
    from cluster.runtime.this_machine import build_machine
    from elastic.config_load import load_here

    machine = build_machine("", grace_s=0.0)
    checks = examine(
        machine,
        config=load_here(args.config, args.overrides) if args.config else None,
        folder=Path(args.storage).absolute(),
        subreaper=SUBREAPER,
        token_file=get_default_path(machine.env),
        find_address=_find_address,
    )
    if args.json:
        print_json({"checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            print(f"{check.status:5} {check.name}: {check.text}")
            if check.fix:
                print(f"      -> {check.fix}")
    return int(any(check.status == "fail" for check in checks))


def _find_address() -> str | None:
    from cluster.runtime.driver import find_address  # with Ray, so only if RAY_ADDRESS is set

    return find_address()
