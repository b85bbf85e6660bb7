"""A folder of Hugging Face becomes the checkpoint of step 0 of a run, from which any world starts.

It holds what is trained, and no more: at step 0 the moments of the optimizer are zeros. With adapters (tune=lora or
qlora) the folder's weights are frozen. They lie beside the checkpoints, once, in the type that they came in (qlora: the
matrices of the blocks in 4 bits, so that no rank ever has them in another form). Step 0 holds the adapters: new ones,
which have no effect yet, or those of a folder of PEFT. Nothing larger than a piece of a tensor is ever in memory.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
from elastic.checkpoint.hf.adapters import AdapterFolder
from elastic.checkpoint.hf.folder import ModelFolder, StoredTensor
from elastic.checkpoint.hf.four_bits import quantise
from elastic.checkpoint.hf.numbers import from_fp32, to_fp32
from elastic.config import RunConfig
from elastic.errors import ModelFolderError, StorageError
from elastic.nf4 import Scales, count_row_bytes
from elastic.ports import DataIdentity, Progress
from elastic.records.rundir import BASE, ORIGIN
from elastic.storage import Storage
from elastic.tuning import LORA_B, find_in_4_bits, get_adapter_shapes

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
    num_trained_params: int
    num_bytes: int
    num_files: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Iterator[bytes]]
    """Yields its bytes in whole blocks; makes them anew each time."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def import_folder(
    folder: ModelFolder,
    run: Storage,
    config: RunConfig,
    *,
    adapters: AdapterFolder | None = None,
    file_bytes: int = _FILE_BYTES,
) -> Imported:
    """Write the checkpoint of step 0 of a run that has none yet.

    Args:
        run: the run's directory.
        config: of the run; its model is the folder's, its adapters are those of `adapters`.
        adapters: what tune=lora or qlora begins with; None: new ones.
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
    run.delete(run.list(f"{BASE}/"))  # likewise: without a checkpoint nothing stands beside it
    for name in _KEPT_FILES:
        if folder.storage.get_size(name) is not None:
            run.write(f"{KEPT}{name}", [folder.storage.read(name)])
    tokenizer = folder.read_tokenizer()
    data = DataIdentity(tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest()) if tokenizer is not None else None
    is_frozen = config.tune != "full"
    in_4_bits = tuple(f".{path}.weight" for path in find_in_4_bits(config.model, config.tune))
    weights = [
        _quantise_stored(f"model.{pair.ours}", folder.tensors[pair.theirs], folder, config.lora.nf4_scales)
        if in_4_bits and pair.ours.endswith(in_4_bits)
        else _read_stored(f"model.{pair.ours}", folder.tensors[pair.theirs], folder.read, is_kept_as_it_is=is_frozen)
        for pair in folder.pairs
    ]
    written: list[Manifest] = []
    if is_frozen:
        extra = {"origin": folder.storage.url}
        written.append(_write(run, BASE, weights, config=config, data=data, extra=extra, file_bytes=file_bytes))
        weights = list(_build_adapters(config, adapters))
    written.append(_write(run, get_directory(0), weights, config=config, data=data, extra={}, file_bytes=file_bytes))
    return Imported(
        num_params=folder.num_params,
        num_trained_params=sum(math.prod(tensor.shape) for tensor in weights),
        num_bytes=sum(record.size_bytes for manifest in written for record in manifest.files.values()),
        num_files=sum(len(manifest.files) for manifest in written),
    )


def _read_stored(
    name: str,
    tensor: StoredTensor,
    read: Callable[..., Iterator[memoryview]],
    *,
    is_kept_as_it_is: bool = False,
) -> _Tensor:
    """Return a tensor of a folder in fp32, or, to be kept as it is, in bf16 if it is in that."""
    dtype = "BF16" if is_kept_as_it_is and tensor.dtype == "BF16" else "F32"
    piece_bytes = _PIECE_BYTES * ITEM_BYTES[tensor.dtype] // ITEM_BYTES[dtype]

    def convert() -> Iterator[bytes]:
        for piece in read(tensor, piece_bytes=piece_bytes):
            yield bytes(piece) if tensor.dtype == dtype else from_fp32(to_fp32(piece, tensor.dtype), "F32")

    return _Tensor(name=name, shape=tensor.shape, dtype=dtype, read=convert)


def _quantise_stored(name: str, tensor: StoredTensor, folder: ModelFolder, scales: Scales) -> _Tensor:
    """Return a matrix of a folder in 4 bits."""
    num_rows, num_columns = tensor.shape
    row_bytes = num_columns * ITEM_BYTES[tensor.dtype]

    def quantise_rows() -> Iterator[bytes]:
        for piece in folder.read(tensor, piece_bytes=max(1, _PIECE_BYTES // row_bytes) * row_bytes):
            try:
                yield quantise(to_fp32(piece, tensor.dtype).reshape(-1, num_columns), scales).tobytes()
            except ValueError as error:
                raise ModelFolderError(
                    f"{folder.storage.url}: {tensor.key} has a weight in {name.removeprefix('model.')} that is not "
                    "finite, and would make a whole block of 4-bit weights useless. Take another copy of the model."
                ) from error

    shape = (num_rows, count_row_bytes(num_columns, scales))
    return _Tensor(name=name, shape=shape, dtype="U8", read=lambda: _cut_blocks(quantise_rows()))


def _cut_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in whole blocks, each of which has a checksum."""
    kept = b""
    for piece in pieces:
        kept += piece
        whole = len(kept) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            yield kept[:whole]
        kept = kept[whole:]
    if kept:
        yield kept


def _build_adapters(config: RunConfig, adapters: AdapterFolder | None) -> Iterator[_Tensor]:
    for name, shape in get_adapter_shapes(config.model, config.lora).items():
        if adapters is not None:
            yield _read_stored(f"model.{name}", adapters.tensors[name], adapters.read)
            continue

        def begin(name: str = name, shape: tuple[int, int] = shape) -> Iterator[bytes]:
            yield _begin_adapter(name, shape, seed=config.train.seed)

        yield _Tensor(name=f"model.{name}", shape=shape, dtype="F32", read=begin)


def _begin_adapter(name: str, shape: tuple[int, int], *, seed: int) -> bytes:
    """Return the first numbers of one matrix, as `nn.init_weights` chooses them: their product is 0."""
    if name.endswith(LORA_B):
        return bytes(4 * math.prod(shape))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    limit = 1 / math.sqrt(shape[1])
    return from_fp32(generator.uniform(-limit, limit, shape).astype(np.float32), "F32")


def _write(
    run: Storage,
    directory: str,
    tensors: Sequence[_Tensor],
    *,
    config: RunConfig,
    data: DataIdentity | None,
    extra: Mapping[str, object],
    file_bytes: int,
) -> Manifest:
    """Write tensors as a checkpoint of step 0."""
    records: dict[str, TensorRecord] = {}
    files: dict[str, FileRecord] = {}
    for number, group in enumerate(_cut(tensors, file_bytes)):
        shard = _Shard(group, file=get_shard_name(generation=0, rank=number))
        run.write(f"{directory}/{shard.file}", shard)
        files[shard.file] = shard.record
        records |= shard.get_index()
    computing = get_computing_config(config, data)
    manifest = Manifest(
        progress=Progress(),
        generation=0,
        world_size=len(files),
        device="cpu",
        mesh=(len(files),),
        config=computing,
        config_hash=get_config_hash(computing),
        tensors=records,
        generators={},
        files=files,
        extra=extra,
    )
    commit(run, directory, manifest)
    return manifest


def _cut(tensors: Sequence[_Tensor], file_bytes: int) -> Iterator[Sequence[_Tensor]]:
    first, used_bytes = 0, 0
    for index, tensor in enumerate(tensors):
        if index > first and used_bytes + tensor.num_bytes > file_bytes:
            yield tensors[first:index]
            first, used_bytes = index, 0
        used_bytes += tensor.num_bytes
    yield tensors[first:]


class _Shard:
    """The bytes of one shard file, made anew each time they are asked for, and their checksums once they were."""

    def __init__(self, tensors: Sequence[_Tensor], *, file: str) -> None:
        self.file = file
        self._tensors = {tensor.name: tensor for tensor in tensors}
        boxes = {tensor.name: Box((0,) * len(tensor.shape), tensor.shape) for tensor in tensors}
        self._layout = build_layout(boxes, {tensor.name: tensor.dtype for tensor in tensors})
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
            checksums: list[int] = []
            for data in self._tensors[name].read():
                checksums += [crc32(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)]
                yield data
            self._crc32[name] = tuple(checksums)
