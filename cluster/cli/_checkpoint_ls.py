"""List a run's checkpoints: state, size, age."""

import argparse
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.cli._runs import add_json, add_run, open_run, print_json
from elastic.errors import StorageError

if TYPE_CHECKING:
    from elastic.checkpoint.durable.inspection import Found
    from elastic.storage import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the run."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each directory below `checkpoints/`.

    Raises:
        StorageError: the storage cannot be read.
    """
    from elastic.checkpoint.durable.storage_errors import explain_unreadable

    storage, step = open_checkpoints(args.run_name)
    try:
        rows = [describe(found) for found in find(storage, step)]
    except OSError as error:
        raise explain_unreadable(error, storage.url) from error
    if args.json:
        print_json({"run": storage.url, "checkpoints": rows})
    else:
        print_table(storage.url, rows)
    return 0


def open_checkpoints(name: str) -> "tuple[Storage, int | None]":
    """Return the run that a name, a path or a URL leads to, and the step if it is one checkpoint's of it.

    Raises:
        StorageError: there is none.
    """
    from elastic.checkpoint.format.manifest import CHECKPOINTS, get_directory_step

    path = urlsplit(name).path if name.startswith("file://") else name
    path = path.rstrip("/") or path
    run, _, last = path.rpartition("/")
    step = get_directory_step(last)
    if step is not None:
        path, (run, _, last) = run, run.rpartition("/")
    if last == CHECKPOINTS.rstrip("/") and run:
        return open_run(run), step
    if step is not None:
        raise StorageError(
            f"RUN={name} names a checkpoint outside of a run: what can be read of it lies in <run>/{CHECKPOINTS}. Name "
            f"the run, or <run>/{CHECKPOINTS}{last or 'step-00000000'}."
        )
    return open_run(path), None


def find(storage: "Storage", step: int | None = None) -> "list[Found]":
    """Return what is below `checkpoints/`, or only the checkpoint of one step.

    Raises:
        StorageError: that one is not there.
    """
    from elastic.checkpoint.durable.inspection import find_checkpoints
    from elastic.checkpoint.format.manifest import get_directory
    from elastic.records.fencing import get_newest_generation

    found = find_checkpoints(storage, newest_generation=get_newest_generation(storage))
    if step is None:
        return found
    own = [one for one in found if get_directory(step).endswith(f"/{one.name}")]
    if not own:
        names = ", ".join(one.name for one in found) or "none"
        raise StorageError(f"{storage.url} has no {get_directory(step)}. Checkpoints there: {names}.")
    return own


def describe(found: "Found") -> dict[str, Any]:
    """Return the JSON object of one directory."""
    from elastic.records.rundir import parse_utc

    manifest = found.manifest
    saved_utc = manifest.saved_utc if manifest else ""
    return {
        "name": found.name,
        "state": found.state,
        "bytes": found.num_bytes,
        "step": manifest.progress.step if manifest else None,
        "tokens": manifest.progress.tokens if manifest else None,
        "attempt": manifest.generation if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "saved_utc": saved_utc or None,
        "age_s": round(time.time() - parse_utc(saved_utc), 1) if saved_utc else None,
        "notes": list(found.notes),
    }


def print_table(url: str, rows: list[dict[str, Any]]) -> None:
    """Print one line per directory, and its notes below."""
    print(f"{url}: {len(rows)} checkpoints")
    for row in rows:
        size = f"{row['bytes'] / 2**20:.1f} MiB" if row["bytes"] < 2**30 else f"{row['bytes'] / 2**30:.2f} GiB"
        age = "-" if row["age_s"] is None else _format_age(row["age_s"])
        world = "" if row["world_size"] is None else f"attempt {row['attempt']}, {row['world_size']} ranks"
        print(f"{row['name']:16} {row['state']:10} {size:>12} {age:>10}  {world}")
        for note in row["notes"]:
            print(f"    {note}")


def _format_age(age_s: float) -> str:
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s / unit_s:.1f} {unit}"
    return f"{age_s:.0f} s"
