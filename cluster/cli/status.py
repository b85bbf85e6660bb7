"""Show how far a run has come, from the files it writes."""

import argparse
import time

from cluster.cli._runs import add_json, add_run, open_rows, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the run."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the status, one value per line."""
    from cluster.report.status import get_status

    with open_rows(args.run_name) as run_dir:
        status = get_status(run_dir, now_s=time.time())
    if args.json:
        print_json(status)
    else:
        for key, value in status.items():
            print(f"{key:26} {_format(value)}")
    return 0


def _format(value: object) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
