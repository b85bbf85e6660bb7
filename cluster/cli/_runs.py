"""How a verb takes RUN and --json."""

import argparse
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic.errors import StorageError
from elastic.records.rundir import RunDir
from elastic.storage import Storage, is_url, open_storage
from elastic.strict_json import dump_json

RUNS = Path("runs")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the RUN argument, for `find_run`."""
    parser.add_argument("run_name", metavar="RUN", help="a run's directory or URL, or its name below runs/")


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
def open_rows(run_name: str) -> Generator[RunDir]:
    """Yield the directory of a run's row files: the run's own, or a copy of those at a URL.

    Raises:
        StorageError: there is no such run, or its storage cannot be read.
    """
    if not is_url(run_name):
        yield find_run(run_name)
        return
    from elastic.checkpoint.durable.storage_errors import explain_unreadable
    from elastic.records.spool import fetch_rows

    url = run_name.rstrip("/")
    storage = open_storage(url)
    with TemporaryDirectory(prefix="solvent-rows-") as folder:
        run_dir = RunDir(Path(folder) / url.rpartition("/")[2])
        run_dir.root.mkdir()
        try:
            if not fetch_rows(storage, run_dir):
                storage.list()  # says so if there is no such bucket
                raise StorageError(
                    f"RUN={run_name} has no {run_dir.config.name} and no rows, so no run has trained there. Give the "
                    "URL of its storage with its name: <storage>/<run>."
                )
        except OSError as error:
            raise explain_unreadable(error, url) from error
        yield run_dir


@contextmanager
def text_on_stderr() -> Generator[None]:
    """Keep stdout for the JSON object: what is printed meanwhile, by Ray's threads as well, goes to stderr."""
    with redirect_stdout(sys.stderr):
        yield


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    print(dump_json(value, indent=2))
