"""Make one self-contained HTML page of a run."""

import argparse

from cluster.cli._runs import add_json, add_run, find_run, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the run."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write report.html into the run's directory and print where it is."""
    from cluster.report.page import build_report

    path = str(build_report(find_run(args.run_name)))
    if args.json:
        print_json({"report": path})
    else:
        print(path)
    return 0
