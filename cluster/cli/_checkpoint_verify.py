"""Read every byte of a run's checkpoints and compare it with its checksum; exit code 0 if the newest is whole."""

import argparse
from typing import TYPE_CHECKING, Any

from cluster.cli._checkpoint_ls import describe, find, open_checkpoints, print_table
from cluster.cli._runs import add_json, add_run, print_json

if TYPE_CHECKING:
    from elastic.storage import Storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the run."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is damaged, by file and tensor.

    Raises:
        StorageError: the storage cannot be read.
    """
    from elastic.checkpoint.durable.inspection import find_all_damage
    from elastic.checkpoint.durable.storage_errors import explain_unreadable

    storage, step = open_checkpoints(args.run_name)
    rows: list[dict[str, Any]] = []
    try:
        for found in find(storage, step):
            damage = list(find_all_damage(storage, found))
            row = describe(found)
            rows.append({**row, "state": "damaged", "notes": damage} if damage else row)
        frozen = _find_frozen_damage(storage)
    except OSError as error:
        raise explain_unreadable(error, storage.url) from error
    # what attempts left unfinished never counted
    committed = [row for row in rows if row["state"] in ("whole", "damaged")]
    is_whole = bool(committed) and committed[-1]["state"] == "whole" and not frozen
    if args.json:
        print_json({"run": storage.url, "newest_is_whole": is_whole, "checkpoints": rows, "base_damage": frozen})
    else:
        print_table(storage.url, rows)
        for damage in frozen:
            print(f"the frozen weights beside which adapters are trained are damaged: {damage}")
        which = "the newest" if step is None else "it"
        print(f"{which} is whole" if is_whole else f"{which} is not whole" if committed else "none is committed")
    return 0 if is_whole else 1


def _find_frozen_damage(storage: "Storage") -> list[str]:
    """Return what is wrong with the weights that adapters stand beside; nothing if the run has none."""
    from elastic.checkpoint.durable.inspection import find_damaged_bytes
    from elastic.checkpoint.format.manifest import CommittedCheckpoint, is_committed, read_manifest
    from elastic.records.rundir import BASE

    if not storage.list(f"{BASE}/"):
        return []
    if not is_committed(storage, BASE):
        return [f"{BASE} was never finished"]
    manifest = read_manifest(storage, CommittedCheckpoint(directory=BASE, step=0))
    return list(find_damaged_bytes(storage, BASE, manifest))
