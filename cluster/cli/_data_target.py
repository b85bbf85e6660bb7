"""What `solvent data` is asked about: a prepared folder, or what a configuration or a run trains on."""

import argparse
from pathlib import Path

from cluster.cli._runs import open_rows
from elastic.config import RunConfig
from elastic.errors import DataError, StorageError, UserError
from elastic.storage import is_url, open_storage


def add_target(parser: argparse.ArgumentParser) -> None:
    """Declare TARGET, for `find_config`."""
    parser.add_argument("target", metavar="TARGET", help="a prepared folder, a configuration, or a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of the configuration")


def is_folder(target: str) -> bool:
    """Tell whether TARGET is a prepared folder, here or in an object store.

    Raises:
        DataError: the store does not answer.
    """
    from elastic.data.prepared.format import DATASET_FILE
    from elastic.data.prepared.hf_tokenizer import is_prepared

    if not is_url(target):
        return is_prepared(target)
    try:
        return open_storage(target).get_size(DATASET_FILE) is not None
    except OSError as error:
        raise DataError(
            f"TARGET={target} cannot be read ({error.strerror}). Check the URL and the environment."
        ) from error


def find_config(args: argparse.Namespace) -> RunConfig:
    """Return the configuration that TARGET is, has, or would be the data of.

    Raises:
        UserError: it is none of these.
    """
    from elastic.config_load import build, load_here

    if is_folder(args.target):
        return build([f"data.path={args.target}", *args.overrides])
    if args.target.endswith((".yaml", ".yml")) or Path(args.target).is_file():
        return load_here(args.target, args.overrides)
    try:
        with open_rows(args.target) as run_dir:
            return load_here(run_dir.config, args.overrides)
    except StorageError as error:
        what = f"it has no dataset.json, and it is no run: {error}"
        raise DataError(f"TARGET={args.target} is no prepared folder ({what})") from error
    except UserError as error:
        raise type(error)(f"TARGET={args.target}: {error}") from error
