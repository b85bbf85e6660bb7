"""Checkpoints in a storage, and which of them count. No torch here.

    checkpoints/step-00000050/
        e00000002-00000.safetensors ...   shards: generation (number of the attempt) and rank that wrote it
        manifest.json                     what was saved, and where each part lies, with checksums
        COMMITTED                         checksum of manifest.json; created last, after all else is durable

A directory without a `COMMITTED` that fits its manifest was never finished, is being removed or is not ours: it is
invisible. There is no pointer to the newest one that could disagree with what is there; it is found by listing.
Nothing here is ever unpickled: shards are safetensors, the rest is JSON.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.format.sharding import Box
from elastic.constraints import NOT_NEGATIVE, POSITIVE, find_violation
from elastic.errors import CheckpointError, StorageError
from elastic.ports import Progress
from elastic.storage import Storage
from elastic.strict_json import dump_json

FORMAT_VERSION = 2
CHECKPOINTS = "checkpoints/"
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
_GENERATION_KEY = "epoch"  # as the files of older versions say

BLOCK_BYTES = 2**20
"""Each so many bytes of a chunk have a checksum of their own; a part of format 2."""

_STEP_NAME = re.compile(r"step-(\d{8})")
_SHARD_NAME = re.compile(r"e(\d{8})-\d{5}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Where a part of a tensor lies."""

    file: str
    offset: Annotated[int, NOT_NEGATIVE]
    """Of its first byte in the file."""
    num_bytes: Annotated[int, NOT_NEGATIVE]
    start: tuple[int, ...]
    """Its first element in the whole tensor, per dim."""
    shape: tuple[int, ...]
    crc32: tuple[int, ...]
    """Of each `BLOCK_BYTES`, the last block shorter; empty in memory alone: they are not taken yet."""

    @property
    def box(self) -> Box:
        """Return its place in the whole tensor."""
        return Box(self.start, self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor: its whole shape, and the chunks that make it up."""

    dtype: str
    """As safetensors names it: ``F32``."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One shard file: all of its bytes are the header's or a chunk's."""

    size_bytes: Annotated[int, NOT_NEGATIVE]
    header_bytes: Annotated[int, NOT_NEGATIVE]
    header_crc32: int | None
    """None in memory alone: it is not taken yet."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, readable without torch."""

    progress: Progress
    generation: Annotated[int, NOT_NEGATIVE]
    """Number of the attempt that wrote it."""
    world_size: Annotated[int, POSITIVE]
    device: str
    """Type of the device that the state lay on: ``cpu`` or ``cuda``."""
    mesh: tuple[int, ...]
    """Ranks along each axis of the device mesh; of hsdp: replicas, shards."""
    config: Mapping[str, Any]
    """The keys that decide what is computed (`compat.get_computing_config`)."""
    config_hash: str
    tensors: Mapping[str, TensorRecord]
    """The state: ``model.*`` and ``optim.*``."""
    generators: Mapping[str, TensorRecord]
    """Each rank's random number generators; they fit only a world of the same size."""
    files: Mapping[str, FileRecord]
    extra: Mapping[str, Any]
    """The caller's own JSON values, such as a gradient scaler's state."""
    saved_utc: str = ""
    """When it was committed."""


BuildManifest = Callable[[Mapping[str, TensorRecord], Mapping[str, FileRecord]], Manifest]
"""Returns a manifest, given where the tensors lie and the files."""


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """A checkpoint that was finished; its files are not yet looked at."""

    directory: str
    """Its key, without a slash at the end."""
    step: int


def get_directory(step: int) -> str:
    """Return the key below which the checkpoint of a step lies."""
    return f"{CHECKPOINTS}step-{step:08d}"


def get_directory_step(name: str) -> int | None:
    """Return the step that a directory's name carries; None if it is no checkpoint's name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def get_shard_name(*, generation: int, rank: int) -> str:
    """Return the name of a rank's file; the generation keeps a writer of an older world from touching a newer one's."""
    return f"e{generation:08d}-{rank:05d}.safetensors"


def get_shard_generation(name: str) -> int | None:
    """Return the generation that a shard's name carries; None if it is no shard's name."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_steps(storage: Storage) -> dict[int, list[str]]:
    """Return the names of the files of every `step-<8 digits>/`, committed or not, by step, oldest first."""
    found: dict[int, list[str]] = {}
    for key in storage.list(CHECKPOINTS):
        directory, _, name = key.removeprefix(CHECKPOINTS).partition("/")
        if name and (match := _STEP_NAME.fullmatch(directory)):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def list_committed(storage: Storage) -> list[CommittedCheckpoint]:
    """Return the committed checkpoints, oldest first; what is torn or foreign is left out."""
    return [
        CommittedCheckpoint(directory=get_directory(step), step=step)
        for step, names in list_steps(storage).items()
        if COMMITTED in names and is_committed(storage, get_directory(step))
    ]


def is_committed(storage: Storage, directory: str) -> bool:
    """Return whether `COMMITTED` is there and fits the manifest beside it."""
    try:
        return storage.read(f"{directory}/{COMMITTED}") == checksum(storage.read(f"{directory}/{MANIFEST}"))
    except FileNotFoundError:
        return False


def commit(storage: Storage, directory: str, manifest: Manifest) -> None:
    """Make a checkpoint visible; all files that the manifest names must be durable already.

    Of two writers of one step the older never replaces the newer one's manifest, and only one creates `COMMITTED`.

    Raises:
        StorageError: another writer was faster.
    """
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    content[_GENERATION_KEY] = content.pop("generation")
    data = dump_json(content, separators=(",", ":")).encode()
    key = f"{directory}/{MANIFEST}"
    if not storage.put_new(key, data):
        generation = json.loads(storage.read(key)).get(_GENERATION_KEY, 0)
        if generation > manifest.generation or storage.get_size(f"{directory}/{COMMITTED}") is not None:
            raise _refuse(storage, directory, generation)
        storage.write(key, [data])
    if not storage.put_new(f"{directory}/{COMMITTED}", checksum(data)):
        raise _refuse(storage, directory, None)


def _refuse(storage: Storage, directory: str, generation: int | None) -> StorageError:
    writer = f"another writer{f' (attempt {generation})' if generation else ''}"
    return StorageError(
        f"{storage.url}/{directory} was committed by {writer} while this one saved the same step, so this one's state "
        "is not needed. Two runs write to one directory: let only one go on, or give this one another name (run=...)."
    )


def read_manifest(storage: Storage, checkpoint: CommittedCheckpoint) -> Manifest:
    """Return what a committed checkpoint holds.

    Raises:
        CheckpointError: another version of Solvent wrote it, or the directory was renamed.
    """
    where = f"{storage.url}/{checkpoint.directory}"
    content = json.loads(storage.read(f"{checkpoint.directory}/{MANIFEST}"))
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has checkpoint format {version}, but this version of Solvent reads format {FORMAT_VERSION}. "
            "Go on with the version that wrote it, or start a new run under another name (run=...)."
        )
    progress = Progress(**content.pop("progress"))
    if progress.step != checkpoint.step:
        raise CheckpointError(
            f"{where} holds step {progress.step}: the directory was renamed, and resuming there would count "
            f"wrong. Rename it to {get_directory(progress.step).removeprefix(CHECKPOINTS)}."
        )
    return Manifest(
        progress=progress,
        generation=content.pop(_GENERATION_KEY),
        mesh=tuple(content.pop("mesh")),
        tensors={name: parse_tensor(record) for name, record in content.pop("tensors").items()},
        generators={name: parse_tensor(record) for name, record in content.pop("generators").items()},
        files={name: FileRecord(**record) for name, record in content.pop("files").items()},
        **content,
    )


def parse_tensor(record: Mapping[str, Any]) -> TensorRecord:
    """Return a record from what JSON made of it."""
    return TensorRecord(
        dtype=record["dtype"],
        shape=tuple(record["shape"]),
        chunks=tuple(
            Chunk(
                file=chunk["file"],
                offset=chunk["offset"],
                num_bytes=chunk["num_bytes"],
                **{key: tuple(cast(list[int], chunk[key])) for key in ("start", "shape", "crc32")},
            )
            for chunk in record["chunks"]
        ),
    )


def find_damage(storage: Storage, checkpoint: CommittedCheckpoint, manifest: Manifest) -> str | None:
    """Return what is wrong: a value that cannot be, a part without its checksums, or a file that is missing or has
    another size than written.

    Only in memory may checksums be lacking (`FileRecord`): what is stored would be believed unverified.
    """
    if violation := _find_violation(manifest):
        return violation
    for name, tensor in {**manifest.tensors, **manifest.generators}.items():
        for chunk in tensor.chunks:
            if len(chunk.crc32) != (wanted := -(-chunk.num_bytes // BLOCK_BYTES)):
                return f"{name} has {len(chunk.crc32)} checksums in {chunk.file} instead of {wanted}"
    for name, record in manifest.files.items():
        if record.header_crc32 is None:
            return f"the header of {name} has no checksum"
        size_bytes = storage.get_size(f"{checkpoint.directory}/{name}")
        if size_bytes is None:
            return f"{name} is missing"
        if size_bytes != record.size_bytes:
            return f"{name} has {size_bytes} bytes instead of {record.size_bytes}"
    return None


def _find_violation(manifest: Manifest) -> str | None:
    """Return the first value that no writer of ours has written: its checksum finds damage, not forgery."""
    records: list[tuple[str, object]] = [("", manifest), ("progress.", manifest.progress)]
    records += [(f"{name}: ", record) for name, record in manifest.files.items()]
    for name, tensor in {**manifest.tensors, **manifest.generators}.items():
        records += [(f"{name}: ", chunk) for chunk in tensor.chunks]
    return next((found for prefix, record in records if (found := find_violation(record, prefix=prefix))), None)


def checksum(data: bytes) -> bytes:
    """Return what `COMMITTED` says of a manifest; CRC-32 finds damage, it is no protection against forgery."""
    return f"crc32:{crc32(data):08x}".encode("ascii")
