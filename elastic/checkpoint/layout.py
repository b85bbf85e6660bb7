"""Checkpoints on disk, and which of them count. No torch here.

    checkpoints/step-00000050/
        __0_0.distcp ...   shards, written by all ranks with torch.distributed.checkpoint
        .metadata          where each tensor lies in the shards
        manifest.json      what was saved, and size and checksum of each file above
        COMMITTED          checksum of manifest.json; written last, after all else is durable

A directory without a `COMMITTED` that fits its manifest was never finished, is being removed or is not ours: it is
invisible. There is no pointer to the newest one that could disagree with what is there; it is found by listing.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic.checkpoint.storage import write_durably
from elastic.errors import CheckpointError
from elastic.ports import Progress

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"

_STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was written; `checksum` names its algorithm: ``crc32:89abcdef``."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, readable without torch."""

    progress: Progress
    world_size: int
    device: str
    """Type of the device that the state lay on: ``cpu`` or ``cuda``."""
    mesh: tuple[int, ...]
    """Ranks along each axis of the device mesh; of hsdp: replicas, shards."""
    config: Mapping[str, Any]
    """The keys that decide what is computed (`fit.get_computing_config`)."""
    config_hash: str
    tensors: Mapping[str, tuple[int, ...]]
    """Whole shape of each tensor, whatever the sharding."""
    files: Mapping[str, FileRecord]
    extra: Mapping[str, Any]
    """The caller's own JSON values, such as a gradient scaler's state."""


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """A checkpoint that was finished; its files are not yet looked at."""

    path: Path
    step: int


def get_directory(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def list_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return every `step-<8 digits>/` directory with its step, committed or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = ((_STEP_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def list_committed(checkpoints: Path) -> list[CommittedCheckpoint]:
    """Return the committed checkpoints, oldest first; what is torn or foreign is left out."""
    return [CommittedCheckpoint(path=path, step=step) for step, path in list_steps(checkpoints) if is_committed(path)]


def is_committed(directory: Path) -> bool:
    """Return whether `COMMITTED` is there and fits the manifest beside it."""
    try:
        return (directory / COMMITTED).read_text("ascii") == checksum((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def commit(directory: Path, manifest: Manifest) -> None:
    """Make a checkpoint visible; all files that the manifest names must be durable already."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    data = json.dumps(content, indent=1).encode()
    write_durably(directory / MANIFEST, data)
    write_durably(directory / COMMITTED, checksum(data).encode("ascii"))


def read_manifest(checkpoint: CommittedCheckpoint) -> Manifest:
    """Return what a committed checkpoint holds.

    Raises:
        CheckpointError: another version of Solvent wrote it, or the directory was renamed.
    """
    content = json.loads((checkpoint.path / MANIFEST).read_bytes())
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint.path} has checkpoint format {version}, but this version of Solvent reads format "
            f"{FORMAT_VERSION}. Go on with the version that wrote it, or start a new run under another name (run=...)."
        )
    progress = Progress(**content.pop("progress"))
    if progress.step != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.path} holds step {progress.step}: the directory was renamed, and resuming there would count "
            f"wrong. Rename it to {get_directory(checkpoint.path.parent, progress.step).name}."
        )
    return Manifest(
        progress=progress,
        mesh=tuple(content.pop("mesh")),
        tensors={name: tuple(shape) for name, shape in content.pop("tensors").items()},
        files={name: FileRecord(**record) for name, record in content.pop("files").items()},
        **content,
    )


def find_damage(checkpoint: CommittedCheckpoint, manifest: Manifest) -> str | None:
    """Return what is wrong with the first file that is missing or has another size than when it was written."""
    for name, record in manifest.files.items():
        try:
            size_bytes = (checkpoint.path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size_bytes != record.size_bytes:
            return f"{name} has {size_bytes} bytes instead of {record.size_bytes}"
    return None


def checksum(data: bytes) -> str:
    """Return the checksum of a whole file; CRC-32 finds damage, it is no protection against forgery."""
    return format_checksum(zlib.crc32(data))


def format_checksum(crc32: int) -> str:
    """Return a CRC-32 as it stands in a `FileRecord`."""
    return f"crc32:{crc32:08x}"
