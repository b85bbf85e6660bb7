"""What a prepared folder holds: `dataset.json`, `tokenizer.json` and token shards.

A shard is an uncompressed Arrow IPC file with one record batch. Its column `tokens: list<uint16 | uint32>` has one row
per document. Its values are one contiguous buffer, so a memory map of the file is the token stream itself, and any
Arrow reader (pandas, polars, duckdb) can look at the documents. Every document ends with the end-of-text token. A
document that does not fit in the rest of a shard goes on as the first row of the next.

A second column, `counted: list<bool>`, is there if not every token counts for the loss: one bit per token, false for
what a model shall read and not learn to write (a prompt). Without it all tokens count.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from zlib_ng.zlib_ng import crc32

from elastic.errors import DataError
from elastic.ports import DataIdentity

DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
BLOCK_SUMS_FILE = "blocks.crc32"
BLOCK_BYTES = 1 << 16
"""What is fetched from an object store, verified and kept at once: a sample is some KiB, at a place by lot."""
VERSION = 1

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

Tokens = npt.NDArray[np.uint16 | np.uint32]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where in a shard's file its parts begin, so that they can be read by range."""

    num_rows: int
    token_bytes: int
    offsets_at: int
    """int32, one more than there are rows."""
    tokens_at: int
    counted_at: int | None = None
    """A bit per token; None: all tokens count."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens; `sha256` is over the whole file."""

    file: str
    num_tokens: int
    size_bytes: int
    sha256: str
    layout: Layout | None = None
    """None: was not written down."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The shards of one split, in the order of their token stream."""

    num_documents: int
    num_tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of `dataset.json`."""

    vocab_size: int
    """The largest token id that the tokenizer of this folder has a name for, plus one."""
    eot_id: int
    tokenizer_sha256: str
    train_entropy_nats: float
    """Entropy per token of the training tokens taken alone: what a model that ignores context reaches at best."""
    val_cross_entropy_nats: float | None
    """Validation tokens under the training frequencies, add-one smoothed; None without validation tokens."""
    train: SplitInfo
    val: SplitInfo
    bos_id: int | None = None
    """The token that begins each document; None: none does (nor did it before this was written down)."""
    largest_id: int | None = None
    """Of the tokens in the shards; None: was not counted."""
    has_counted: bool = False
    """Shards say of each token whether it counts for the loss."""
    has_block_sums: bool = False
    """There is a `blocks.crc32`: of each `BLOCK_BYTES` of each shard, those of train first, its crc32 in 4 bytes."""

    @property
    def needed_vocab_size(self) -> int:
        """How many rows an embedding needs for this data.

        A tokenizer may have names for more (added tokens beyond a published model's embedding): what does not occur
        needs no row.
        """
        return self.vocab_size if self.largest_id is None else self.largest_id + 1

    @property
    def identity(self) -> DataIdentity:
        """What tells this data from any other, wherever the folder lies."""
        hashes = [json.dumps([shard.sha256 for shard in self.get_split(split).shards]) for split in SPLITS]
        train, val = (hashlib.sha256(text.encode()).hexdigest() for text in hashes)
        return DataIdentity(
            tokenizer_sha256=self.tokenizer_sha256,
            train_sha256=train,
            val_sha256=val,
            train_tokens=self.train.num_tokens,
            val_tokens=self.val.num_tokens,
        )

    def get_split(self, split: Split) -> SplitInfo:
        """Return the part of that name."""
        return self.train if split == "train" else self.val


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Write `dataset.json`."""
    (folder / DATASET_FILE).write_bytes(dump_info(info))


def dump_info(info: DatasetInfo) -> bytes:
    """Return the content of a `dataset.json`."""
    return (json.dumps({"version": VERSION, **asdict(info)}, indent=2) + "\n").encode()


def read_info(folder: Path) -> DatasetInfo:
    """Read `dataset.json`.

    Raises:
        DataError: not made by `solvent prepare`, or by another version of it.
    """
    path = folder / DATASET_FILE
    return parse_info(path.read_bytes(), path)


def parse_info(content: bytes, path: Path | str) -> DatasetInfo:
    """Return what the bytes of a `dataset.json` say.

    Raises:
        DataError: not made by `solvent prepare`, or by another version of it.
    """
    try:
        raw = json.loads(content)
        version = raw.pop("version")
        if version == VERSION:
            train, val = (_parse_split(raw.pop(split)) for split in SPLITS)
            return DatasetInfo(train=train, val=val, **raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): it is not what `solvent prepare` writes. "
            "Prepare the data again into a new folder."
        ) from error
    raise DataError(
        f"{path} has version {version!r}, this program reads version {VERSION}. Prepare the data again into a new "
        "folder."
    )


def _parse_split(raw: Mapping[str, Any]) -> SplitInfo:
    shards = tuple(_parse_shard(shard) for shard in raw["shards"])
    return SplitInfo(num_documents=raw["num_documents"], num_tokens=raw["num_tokens"], shards=shards)


def _parse_shard(raw: Mapping[str, Any]) -> Shard:
    fields = dict(raw)
    if layout := fields.pop("layout", None):
        fields["layout"] = Layout(**layout)
    shard = Shard(**fields)
    if shard.file in ("", ".", "..") or "/" in shard.file:  # it may be a stranger's
        raise DataError(
            f"{DATASET_FILE} names {shard.file!r}, a file outside of its folder, as a shard: `solvent prepare` never "
            "does. Prepare the data again into a new folder."
        )
    return shard


def write_shard(
    path: Path, tokens: Tokens, row_offsets: npt.NDArray[np.int32], counted: npt.NDArray[np.bool_] | None = None
) -> Shard:
    """Write one shard.

    Args:
        tokens: the whole stream of this shard.
        row_offsets: where each row begins, and the length of the stream at the end.
        counted: which tokens count for the loss; None: all.
    """
    offsets = pa.array(row_offsets)
    columns = {"tokens": pa.ListArray.from_arrays(offsets, pa.array(tokens))}
    if counted is not None:
        columns["counted"] = pa.ListArray.from_arrays(offsets, pa.array(counted))
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(
        file=path.name,
        num_tokens=len(tokens),
        size_bytes=path.stat().st_size,
        sha256=hash_file(path),
        layout=find_layout(path),
    )


def find_layout(path: Path) -> Layout:
    """Return where a shard has what; of its bytes, only the first and the last need be there."""
    with pa.memory_map(str(path)) as file:
        start = file.read_buffer(file.size()).address
        batch = pa.ipc.open_file(file).get_batch(0)
        rows = batch.column("tokens")
        counted = batch.column("counted").values.buffers()[1] if "counted" in batch.schema.names else None
        return Layout(
            num_rows=len(rows),
            token_bytes=rows.type.value_type.bit_width // 8,
            offsets_at=rows.buffers()[1].address - start,
            tokens_at=rows.values.buffers()[1].address - start,
            counted_at=counted.address - start if counted else None,
        )


def count_blocks(shard: Shard) -> int:
    """Return how many blocks a shard has."""
    return -(-shard.size_bytes // BLOCK_BYTES)


def write_block_sums(folder: Path, info: DatasetInfo) -> None:
    """Write `blocks.crc32`."""
    with (folder / BLOCK_SUMS_FILE).open("wb") as out:
        for shard in (shard for split in SPLITS for shard in info.get_split(split).shards):
            with (folder / shard.file).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    out.write(crc32(block).to_bytes(4, "little"))


@dataclass(frozen=True, kw_only=True)
class MappedShard:
    """A shard's content as read-only views of the memory-mapped file."""

    tokens: Tokens
    row_offsets: npt.NDArray[np.int32]
    """Where each row begins in `tokens`, and their number at the end."""
    counted_bits: npt.NDArray[np.uint8] | None
    """One bit per token, the lowest first; None: all count."""


def map_shard(path: Path) -> MappedShard:
    """Open a shard.

    Raises:
        DataError: it is none.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        rows = batch.column("tokens")
        counted = batch.column("counted").values if "counted" in batch.schema.names else None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} is no shard of `solvent prepare` ({error}). Copy the folder again.") from error
    return MappedShard(
        # not `to_numpy`, which imports pandas: 300 modules in the way of every trainer's first step
        tokens=cast(Tokens, np.from_dlpack(rows.values)),
        row_offsets=cast(npt.NDArray[np.int32], np.from_dlpack(rows.offsets)),
        counted_bits=None if counted is None else np.frombuffer(counted.buffers()[1], np.uint8),
    )


def unpack_bits(bits: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.bool_]:
    """Return `count` bits from the one at `start`, the lowest bit of a byte being its first."""
    first = start // 8
    some = np.unpackbits(bits[first : (start + count + 7) // 8], bitorder="little")
    return some[start - 8 * first :][:count].astype(np.bool_)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
