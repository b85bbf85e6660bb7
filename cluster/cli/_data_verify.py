"""Read every byte of prepared data and look at its content; exit code 0 if it is whole."""

import argparse
from typing import Any

from cluster.cli._data_target import add_target, find_config
from cluster.cli._runs import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take what to read."""
    add_target(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is damaged, a line each.

    Raises:
        DataError: it is no prepared folder.
    """
    from pathlib import Path

    from elastic.data.folder import LocalFolder
    from elastic.data.format import read_info
    from elastic.data.inspection import find_damage
    from elastic.data.shards import Dataset
    from elastic.mixture import get_paths

    rows: list[dict[str, Any]] = []
    for path in map(Path, get_paths(find_config(args).data).values()):
        info = read_info(path)
        damage = list(find_damage(path, Dataset(LocalFolder(path), info)))
        num_bytes = sum(shard.size_bytes for shard in (*info.train.shards, *info.val.shards))
        rows.append({"path": str(path), "is_whole": not damage, "damage": damage, "bytes": num_bytes})
    if args.json:
        print_json({"is_whole": all(row["is_whole"] for row in rows), "sources": rows})
    else:
        for row in rows:
            print(*row["damage"], sep="\n", end="\n" if row["damage"] else "")
            print(f"{row['path']} is {'' if row['is_whole'] else 'not '}whole ({row['bytes'] / 2**20:,.1f} MiB read)")
    return 0 if all(row["is_whole"] for row in rows) else 1
