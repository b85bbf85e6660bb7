"""What checkpoints a run has, and whether they are whole: for people, without training. No torch here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from elastic.checkpoint.format.manifest import (
    CHECKPOINTS,
    COMMITTED,
    CommittedCheckpoint,
    Manifest,
    find_damage,
    get_directory,
    get_shard_generation,
    is_committed,
    list_steps,
    read_manifest,
)
from elastic.checkpoint.format.read_plan import plan_checks
from elastic.checkpoint.format.sources import DamageError, StorageSource, read_verified
from elastic.errors import CheckpointError
from elastic.storage import Storage

State = Literal["whole", "damaged", "unfinished", "stale", "foreign"]
"""`unfinished`: the newest attempt is writing it, or was killed at it. `stale`: an older attempt was. `foreign`: not
ours, and never touched."""

_READ_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Found:
    """One directory below `checkpoints/`."""

    name: str
    state: State
    num_bytes: int
    """Of all its files."""
    manifest: Manifest | None
    """None: it has none that counts."""
    notes: tuple[str, ...] = ()
    """What is damaged, by file and tensor, or left over."""


def find_checkpoints(storage: Storage, *, newest_generation: int) -> list[Found]:
    """Return what is below `checkpoints/`, ours from oldest to newest and then what is foreign; contents are not read.

    Args:
        newest_generation: of the run's attempts; what an older one left unfinished is stale.

    Raises:
        OSError: the storage cannot be read.
    """
    steps = list_steps(storage)
    own = {get_directory(step).removeprefix(CHECKPOINTS) for step in steps}
    strange: dict[str, int] = {}
    for key in storage.list(CHECKPOINTS):
        name = key.removeprefix(CHECKPOINTS).partition("/")[0]
        if name not in own:
            strange[name] = strange.get(name, 0) + (storage.get_size(key) or 0)
    return [
        *(_inspect(storage, step, names, newest_generation) for step, names in steps.items()),
        *(Found(name=name, state="foreign", num_bytes=size, manifest=None) for name, size in sorted(strange.items())),
    ]


def find_all_damage(storage: Storage, found: Found) -> Iterator[str]:
    """Read every byte of a checkpoint and yield what is damaged, by file and tensor.

    Raises:
        OSError: the storage cannot be read.
    """
    yield from found.notes if found.state == "damaged" else ()
    if found.manifest is not None:
        yield from find_damaged_bytes(storage, CHECKPOINTS + found.name, found.manifest)


def find_damaged_bytes(storage: Storage, directory: str, manifest: Manifest) -> Iterator[str]:
    """Read all that a manifest names and yield what is damaged, by file and tensor.

    Raises:
        OSError: the storage cannot be read.
    """
    source = StorageSource(storage, directory)
    for read in plan_checks({**manifest.tensors, **manifest.generators}, manifest.files, max_bytes=_READ_BYTES):
        buffer = memoryview(bytearray(read.num_bytes))
        try:
            read_verified(read, [source], lambda buffer=buffer: buffer)
        except DamageError as error:
            yield str(error)


def _inspect(storage: Storage, step: int, names: list[str], newest_generation: int) -> Found:
    directory = get_directory(step)
    name = directory.removeprefix(CHECKPOINTS)
    num_bytes = sum(storage.get_size(f"{directory}/{file}") or 0 for file in names)
    if COMMITTED not in names:
        generation = max((get_shard_generation(file) or 0 for file in names), default=0)
        note = (
            f"attempt {generation} left it"
            if generation < newest_generation
            else f"attempt {generation} has not finished it"
        )
        state: State = "stale" if generation < newest_generation else "unfinished"
        return Found(name=name, state=state, num_bytes=num_bytes, manifest=None, notes=(note,))
    if not is_committed(storage, directory):
        note = "COMMITTED does not fit manifest.json: one of them was changed"
        return Found(name=name, state="damaged", num_bytes=num_bytes, manifest=None, notes=(note,))
    checkpoint = CommittedCheckpoint(directory=directory, step=step)
    try:
        manifest = read_manifest(storage, checkpoint)
    except (CheckpointError, json.JSONDecodeError) as error:
        return Found(name=name, state="damaged", num_bytes=num_bytes, manifest=None, notes=(str(error),))
    damage = find_damage(storage, checkpoint, manifest)
    left = sorted(file for file in names if get_shard_generation(file) is not None and file not in manifest.files)
    notes = (*([damage] if damage else []), *(f"{file} is left over from another attempt" for file in left))
    return Found(name=name, state="damaged" if damage else "whole", num_bytes=num_bytes, manifest=manifest, notes=notes)
