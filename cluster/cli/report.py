"""Make one self-contained HTML page of a run."""

import argparse
from pathlib import Path

from cluster.cli._runs import add_json, add_run, open_rows, print_json
from elastic.storage import is_url, join_url, open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the run."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write report.html into the run's directory, or beside its rows in the store, and print where it is.

    Raises:
        StorageError: there is no such run, or its storage does not work.
    """
    from cluster.report.page import build_report

    with open_rows(args.run_name) as run_dir:
        report = build_report(run_dir)
        path = _store(report, args.run_name) if is_url(args.run_name) else str(report)
    if args.json:
        print_json({"report": path})
    else:
        print(path)
    return 0


def _store(report: Path, run_url: str) -> str:
    from elastic.checkpoint.durable.storage_errors import explain

    try:
        open_storage(run_url).write(report.name, [report.read_bytes()])
    except OSError as error:
        raise explain(error, run_url) from error
    return join_url(run_url, report.name)
