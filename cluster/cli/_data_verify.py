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
    from elastic.data.inspection import find_damage
    from elastic.data.prepared.shards import open_unchecked
    from elastic.mixture import get_paths

    rows: list[dict[str, Any]] = []
    for key, path in get_paths(find_config(args).data).items():
        dataset = open_unchecked(path, key=key)
        damage = list(find_damage(dataset))
        num_bytes = sum(shard.size_bytes for shard in (*dataset.info.train.shards, *dataset.info.val.shards))
        rows.append({"path": path, "is_whole": not damage, "damage": damage, "bytes": num_bytes})
    if args.json:
        print_json({"is_whole": all(row["is_whole"] for row in rows), "sources": rows})
    else:
        for row in rows:
            print(*row["damage"], sep="\n", end="\n" if row["damage"] else "")
            print(f"{row['path']} is {'' if row['is_whole'] else 'not '}whole ({row['bytes'] / 2**20:,.1f} MiB read)")
    return 0 if all(row["is_whole"] for row in rows) else 1
