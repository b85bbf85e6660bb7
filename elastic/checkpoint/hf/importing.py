"""A folder of Hugging Face becomes the checkpoint of step 0 of a run, from which any world starts.

It holds the weights alone: at step 0 the moments of the optimizer are zeros. Nothing larger than a piece of a tensor is
ever in memory.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.durable.retention import remove_orphans
from elastic.checkpoint.format.compat import get_computing_config, get_config_hash
from elastic.checkpoint.format.manifest import (
    BLOCK_BYTES,
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    commit,
    get_directory,
    get_shard_name,
    list_steps,
)
from elastic.checkpoint.format.sharding import ITEM_BYTES, Box, build_layout
from elastic.checkpoint.hf.families._base import Pair
from elastic.checkpoint.hf.folder import ModelFolder
from elastic.checkpoint.hf.numbers import from_fp32, to_fp32
from elastic.config import RunConfig
from elastic.errors import StorageError
from elastic.ports import DataIdentity, Progress
from elastic.records.rundir import ORIGIN
from elastic.storage import Storage

_PIECE_BYTES = 16 * BLOCK_BYTES
"""Of the numbers as they are written: whole blocks, so that each has a checksum of its own."""
_FILE_BYTES = 4 * 2**30

KEPT = f"{ORIGIN}/"
"""Below this key a run keeps what an export gives back unchanged: the tokenizer, and the ids of special tokens."""
_KEPT_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written."""

    num_params: int
    num_bytes: int
    num_files: int


def import_folder(folder: ModelFolder, run: Storage, config: RunConfig, *, file_bytes: int = _FILE_BYTES) -> Imported:
    """Write the checkpoint of step 0 of a run that has none yet.

    Args:
        run: the run's directory.
        config: of the run; its model is the folder's.
        file_bytes: of one shard; a tensor that is larger has a shard of its own.

    Raises:
        StorageError: the run has begun already.
        ModelFolderError: the folder cannot be read to its end; the run has no checkpoint then.
        OSError: the run's directory cannot be written.
    """
    assert config.model == folder.model, "a run's weights have the shape that its configuration says"
    remove_orphans(run, generation=0)  # of an import that was cut short
    steps = list_steps(run)
    if steps:
        raise StorageError(
            f"{run.url} has a checkpoint of step {max(steps)} already, and a run has one beginning. Import into "
            "another one with run=<new name>, or remove this one."
        )
    for name in _KEPT_FILES:
        if folder.storage.get_size(name) is not None:
            run.write(f"{KEPT}{name}", [folder.storage.read(name)])
    directory = get_directory(0)
    tensors: dict[str, TensorRecord] = {}
    files: dict[str, FileRecord] = {}
    for number, pairs in enumerate(_cut(folder.pairs, file_bytes)):
        shard = _Shard(folder, pairs, file=get_shard_name(generation=0, rank=number))
        run.write(f"{directory}/{shard.file}", shard)
        files[shard.file] = shard.record
        tensors |= shard.get_index()
    tokenizer = folder.read_tokenizer()
    data = DataIdentity(tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest()) if tokenizer is not None else None
    computing = get_computing_config(config, data)
    manifest = Manifest(
        progress=Progress(),
        generation=0,
        world_size=len(files),
        device="cpu",
        mesh=(len(files),),
        config=computing,
        config_hash=get_config_hash(computing),
        tensors=tensors,
        generators={},
        files=files,
        extra={},
    )
    commit(run, directory, manifest)
    return Imported(
        num_params=folder.num_params,
        num_bytes=sum(record.size_bytes for record in files.values()),
        num_files=len(files),
    )


def _cut(pairs: Sequence[Pair], file_bytes: int) -> Iterator[Sequence[Pair]]:
    first, used_bytes = 0, 0
    for index, pair in enumerate(pairs):
        num_bytes = math.prod(pair.shape) * ITEM_BYTES["F32"]
        if index > first and used_bytes + num_bytes > file_bytes:
            yield pairs[first:index]
            first, used_bytes = index, 0
        used_bytes += num_bytes
    yield pairs[first:]


class _Shard:
    """The bytes of one shard file, made anew each time they are asked for, and their checksums once they were."""

    def __init__(self, folder: ModelFolder, pairs: Sequence[Pair], *, file: str) -> None:
        self.file = file
        self._folder = folder
        self._theirs = {f"model.{pair.ours}": pair.theirs for pair in pairs}
        boxes = {f"model.{pair.ours}": Box((0,) * len(pair.shape), pair.shape) for pair in pairs}
        self._layout = build_layout(boxes, dict.fromkeys(boxes, "F32"))
        self._crc32: dict[str, tuple[int, ...]] = {}

    @property
    def record(self) -> FileRecord:
        """The file's line in the manifest."""
        header = self._layout.header
        return FileRecord(size_bytes=self._layout.num_bytes, header_bytes=len(header), header_crc32=crc32(header))

    def get_index(self) -> dict[str, TensorRecord]:
        """Return the lines of the tensors; the file must have been written."""
        return {
            name: TensorRecord(
                dtype=entry.dtype,
                shape=entry.box.shape,
                chunks=(
                    Chunk(
                        file=self.file,
                        offset=entry.offset,
                        num_bytes=entry.num_bytes,
                        start=entry.box.start,
                        shape=entry.box.shape,
                        crc32=self._crc32[name],
                    ),
                ),
            )
            for name, entry in self._layout.entries.items()
        }

    def __iter__(self) -> Iterator[bytes]:
        yield self._layout.header
        for name in self._layout.entries:
            tensor = self._folder.tensors[self._theirs[name]]
            checksums: list[int] = []
            piece_bytes = _PIECE_BYTES * ITEM_BYTES[tensor.dtype] // ITEM_BYTES["F32"]
            for piece in self._folder.read(tensor, piece_bytes=piece_bytes):
                data = from_fp32(to_fp32(piece, tensor.dtype), "F32")
                checksums += [crc32(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
                yield data
            self._crc32[name] = tuple(checksums)
