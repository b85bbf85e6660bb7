"""Read every byte of prepared data and look at its content; exit code 0 if it is whole."""

import argparse

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

    path = Path(find_config(args).data.path)
    info = read_info(path)
    damage = list(find_damage(path, Dataset(LocalFolder(path), info)))
    if args.json:
        print_json({"path": str(path), "is_whole": not damage, "damage": damage})
    else:
        for line in damage:
            print(line)
        num_bytes = sum(shard.size_bytes for shard in (*info.train.shards, *info.val.shards))
        print(f"{path} is {'not ' if damage else ''}whole ({num_bytes / 2**20:,.1f} MiB read)")
    return 1 if damage else 0
