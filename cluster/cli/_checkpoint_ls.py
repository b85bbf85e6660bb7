"""List a run's checkpoints: state, size, age."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from cluster.cli._runs import add_json, add_run, open_run, print_json

if TYPE_CHECKING:
    from elastic.checkpoint.verify import Found
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
    from elastic.checkpoint.storage import explain_unreadable

    storage = open_run(args.run_name)
    try:
        rows = [describe(found) for found in find(storage)]
    except OSError as error:
        raise explain_unreadable(error, storage.url) from error
    if args.json:
        print_json({"run": storage.url, "checkpoints": rows})
    else:
        print_table(storage.url, rows)
    return 0


def find(storage: "Storage") -> "list[Found]":
    """Return what is below `checkpoints/`."""
    from elastic.checkpoint.verify import find_checkpoints
    from elastic.epochs import get_newest_epoch

    return find_checkpoints(storage, newest_epoch=get_newest_epoch(storage))


def describe(found: "Found") -> dict[str, Any]:
    """Return the JSON object of one directory."""
    from elastic.rundir import parse_utc

    manifest = found.manifest
    saved_utc = manifest.saved_utc if manifest else ""
    return {
        "name": found.name,
        "state": found.state,
        "bytes": found.num_bytes,
        "step": manifest.progress.step if manifest else None,
        "tokens": manifest.progress.tokens if manifest else None,
        "attempt": manifest.epoch if manifest else None,
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
