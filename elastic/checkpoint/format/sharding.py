"""Which rank writes which part of the state, and how a rank's shard file is laid out. Pure; no torch here.

Every byte of the state is in one shard once. What several ranks hold alike (DDP, replicas of HSDP) is cut into rows, so
that each of them writes its share; what is too small to cut goes to the rank with the least to write.

A shard is a safetensors file, with the place of each chunk in its whole tensor where `torch.distributed.checkpoint`'s
own HuggingFaceStorageReader looks for it. Source: https://huggingface.co/docs/safetensors (format; no holes between
tensors), torch/distributed/checkpoint/_hf_utils.py@v2.13 (DCP_SHARDING_INFO).
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element, by the names that safetensors gives to types."""

ALIGNMENT = 64
"""The data of a shard start at a multiple of this."""

_CUT_BYTES = 4096
"""A share smaller than this is not worth a chunk of its own."""


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of a tensor: where it starts and how far it goes, per dim."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Return how many elements it has; a scalar has one."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one tensor lies on the ranks of a world."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    """Its name in safetensors: ``F32``."""
    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """Those of the mesh, row by row."""
    sharded_dims: tuple[int | None, ...]
    """Per axis of the mesh the dim that is cut over it; None: all along the axis hold the same."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One chunk in a shard file."""

    offset: int
    """Of its first byte in the file."""
    num_bytes: int
    dtype: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """The bytes of one shard file: `header`, then the chunks of `entries` without a gap."""

    header: bytes
    entries: Mapping[str, Entry]
    num_bytes: int


def get_box(spread: Spread, rank: int) -> Box | None:
    """Return the part of a tensor that a rank holds; None if it is empty.

    A dim is cut as `torch.chunk` cuts it: all parts but the last ones have ``ceil(size / ranks)`` rows.
    """
    place = spread.ranks.index(rank)
    start, shape = [0] * len(spread.shape), list(spread.shape)
    stride = len(spread.ranks)
    for size, dim in zip(spread.mesh_shape, spread.sharded_dims, strict=True):
        stride //= size
        coordinate = place // stride % size
        if dim is not None:
            rows = -(-shape[dim] // size)
            first = min(coordinate * rows, shape[dim])
            shape[dim] = min(rows, shape[dim] - first)
            start[dim] += first
    return Box(tuple(start), tuple(shape)) if all(shape) else None


def plan_chunks(spreads: Mapping[str, Spread], *, world_size: int) -> list[dict[str, Box]]:
    """Return what each rank writes: of each tensor at most one box, all boxes together the whole state once."""
    chunks: list[dict[str, Box]] = [{} for _ in range(world_size)]
    load_bytes = [0] * world_size
    small: list[tuple[int, str, Box, tuple[int, ...]]] = []

    def assign(rank: int, name: str, box: Box) -> None:
        chunks[rank][name] = box
        load_bytes[rank] += box.num_elements * ITEM_BYTES[spreads[name].dtype]

    known: dict[Spread, dict[Box, list[int]]] = {}  # layers repeat: few spreads are different
    for name, spread in sorted(spreads.items()):
        if spread not in known:
            known[spread] = _find_holders(spread)
        for box, ranks in known[spread].items():
            num_bytes = box.num_elements * ITEM_BYTES[spread.dtype]
            if len(ranks) == 1:
                assign(ranks[0], name, box)
            elif box.shape and box.shape[0] >= len(ranks) and num_bytes >= _CUT_BYTES * len(ranks):
                for rank, part in zip(ranks, _cut_rows(box, len(ranks)), strict=True):
                    assign(rank, name, part)
            else:
                small.append((num_bytes, name, box, tuple(ranks)))
    for _, name, box, ranks in sorted(small, key=lambda item: (-item[0], item[1:])):
        free = [rank for rank in ranks if name not in chunks[rank]]
        assign(min(free, key=lambda rank: (load_bytes[rank], rank)), name, box)
    return chunks


def build_layout(boxes: Mapping[str, Box], dtypes: Mapping[str, str]) -> ShardLayout:
    """Lay out one shard file.

    Wide types come first, so that every chunk is aligned to its elements although there may be no gap between two.
    """
    sizes = {name: box.num_elements * ITEM_BYTES[dtypes[name]] for name, box in boxes.items()}
    names = sorted(boxes, key=lambda name: (-ITEM_BYTES[dtypes[name]], sizes[name] % ALIGNMENT != 0, name))
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": boxes[name].start} for name in names}),
        }
    }
    end = 0
    for name in names:
        header[name] = {
            "dtype": dtypes[name],
            "shape": boxes[name].shape,
            "data_offsets": [end, end + sizes[name]],
        }
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data_start = 8 + len(text)
    entries: dict[str, Entry] = {}
    offset = data_start
    for name in names:
        entries[name] = Entry(offset=offset, num_bytes=sizes[name], dtype=dtypes[name], box=boxes[name])
        offset += sizes[name]
    return ShardLayout(header=len(text).to_bytes(8, "little") + text, entries=entries, num_bytes=data_start + end)


def _find_holders(spread: Spread) -> dict[Box, list[int]]:
    holders: defaultdict[Box, list[int]] = defaultdict(list)
    for rank in sorted(spread.ranks):
        if (box := get_box(spread, rank)) is not None:
            holders[box].append(rank)
    return dict(holders)


def _cut_rows(box: Box, num_parts: int) -> Sequence[Box]:
    edges = [box.shape[0] * i // num_parts for i in range(num_parts + 1)]
    return [
        Box((box.start[0] + first, *box.start[1:]), (stop - first, *box.shape[1:])) for first, stop in pairwise(edges)
    ]
