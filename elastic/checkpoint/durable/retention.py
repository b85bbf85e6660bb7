"""Remove checkpoints that are no longer wanted; only rank 0 calls this. No torch here."""

from elastic.checkpoint.format.manifest import (
    CHECKPOINTS,
    COMMITTED,
    find_damage,
    get_directory,
    get_shard_generation,
    list_committed,
    list_steps,
    read_manifest,
)
from elastic.errors import CheckpointError
from elastic.storage import Storage


def prune(storage: Storage, keep_last: int) -> None:
    """Remove all committed checkpoints but the newest `keep_last` (at least 1) and the newest that is whole."""
    assert keep_last >= 1, "the newest committed checkpoint is never removed"
    committed = list_committed(storage)
    kept = committed[-keep_last:]
    for checkpoint in reversed(committed):  # usually the first: the one that was just written
        try:
            if find_damage(storage, checkpoint, read_manifest(storage, checkpoint)) is None:
                kept.append(checkpoint)
                break
        except CheckpointError:
            continue
    for checkpoint in committed:
        if checkpoint not in kept:
            discard(storage, checkpoint.step)


def remove_orphans(storage: Storage, *, generation: int) -> None:
    """Remove what saves of this and older generations that were cut short have left; none of them may be in flight.

    A directory whose `COMMITTED` is there but does not fit its manifest is damaged, not unfinished: it stays for the
    user to look at. One with a shard of a newer generation is another writer's.
    """
    storage.sweep(CHECKPOINTS)
    for step, names in list_steps(storage).items():
        newest = max((get_shard_generation(name) or 0 for name in names), default=0)
        if COMMITTED not in names and newest <= generation:
            storage.delete(f"{get_directory(step)}/{name}" for name in names)


def discard(storage: Storage, step: int) -> None:
    """Remove one checkpoint, its `COMMITTED` first: a crash on the way leaves it invisible, never half there."""
    directory = get_directory(step)
    storage.delete([f"{directory}/{COMMITTED}"])
    storage.delete(storage.list(f"{directory}/"))
