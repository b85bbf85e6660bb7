"""How a verb takes RUN and --json."""

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path

from elastic.errors import StorageError
from elastic.rundir import RunDir
from elastic.storage import Storage, is_url, open_storage

RUNS = Path("runs")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the RUN argument, for `find_run`."""
    parser.add_argument("run_name", metavar="RUN", help="a run's directory, or its name below runs/")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json, for `print_json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def find_run(run_name: str) -> RunDir:
    """Return the run at this path, else the one of this name below runs/.

    Raises:
        StorageError: there is neither.
    """
    for path in (Path(run_name), RUNS / run_name):
        if path.is_dir():
            return RunDir(path)
    names = sorted(p.name for p in RUNS.glob("*") if p.is_dir())
    near = get_close_matches(Path(run_name).name, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Runs here are: {', '.join(names) or 'none yet'}."
    raise StorageError(f"RUN={run_name} is not a directory, nor is {RUNS / run_name}. {hint}")


def open_run(run_name: str) -> Storage:
    """Return the storage of the run at this path or URL, else of the one of this name below runs/.

    Raises:
        StorageError: there is none.
    """
    return open_storage(run_name if is_url(run_name) else find_run(run_name).root)


@contextmanager
def text_on_stderr() -> Generator[None]:
    """Keep stdout for the JSON object: what is printed meanwhile, by Ray's threads as well, goes to stderr."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=2))
