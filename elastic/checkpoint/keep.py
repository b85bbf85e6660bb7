"""Remove checkpoints that are no longer wanted; only rank 0 calls this. No torch here."""

import shutil
from pathlib import Path

from elastic.checkpoint.layout import COMMITTED, list_committed, list_steps
from elastic.checkpoint.storage import sync_directory


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all committed checkpoints but the newest `keep_last` (at least 1)."""
    assert keep_last >= 1, "the newest committed checkpoint is never removed"
    for checkpoint in list_committed(checkpoints)[:-keep_last]:
        discard(checkpoint.path)


def remove_orphans(checkpoints: Path) -> None:
    """Remove what saves that were cut short have left; no save may be in flight.

    A directory whose `COMMITTED` is there but does not fit its manifest is damaged, not unfinished: it stays for the
    user to look at.
    """
    for _, path in list_steps(checkpoints):
        if not (path / COMMITTED).exists():
            shutil.rmtree(path)


def discard(directory: Path) -> None:
    """Remove one checkpoint, its `COMMITTED` first: a crash on the way leaves it invisible, never half there."""
    (directory / COMMITTED).unlink(missing_ok=True)
    sync_directory(directory)
    shutil.rmtree(directory)
