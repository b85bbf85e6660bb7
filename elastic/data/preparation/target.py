"""The folder that `prepare` makes: written beside its place and renamed at the end, complete or not there."""

import errno
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from elastic.data.prepared.format import DATASET_FILE
from elastic.errors import DataError
from elastic.storage.local import sync


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that is something else than what `prepare` made, or that may not be replaced.

    Raises:
        DataError: it is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DATASET_FILE).is_file():
        raise DataError(f"{out} is in the way: it exists and `solvent prepare` did not make it. Choose another --out.")
    if not overwrite:
        raise DataError(f"{out} holds prepared data already. Choose another --out, or replace it with --overwrite.")


@contextmanager
def stage_folder(out: Path) -> Generator[Path]:
    """Give a folder beside the target that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        DataError: it cannot be made, or not be written to its end.
    """
    staged = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made ({error}). Choose a folder that you may write to as --out.") from error
    try:
        yield staged
        for path in (*staged.iterdir(), staged):
            sync(path)
        if out.exists():
            replaced = out.with_name(f".{out.name}.replaced-{secrets.token_hex(4)}")
            out.rename(replaced)
            staged.rename(out)
            shutil.rmtree(replaced)
        else:
            staged.rename(out)
        sync(out.parent)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _explain_write(error, out) from error
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _explain_write(error: OSError, out: Path) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free some space there, or choose" if full else "Check that disk, or choose"
    return DataError(
        f"{out} cannot be written ({os.strerror(error.errno) if error.errno else error}), so the data is not complete, "
        f"and what there was of it is removed. {hint} another disk with --out."
    )
