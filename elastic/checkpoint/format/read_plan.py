"""Which bytes of a checkpoint a rank has to read for the part of the state that it holds. Pure; no torch here.

Checksums are those of blocks of one MiB of a chunk, so that a rank that needs a part of a chunk (the world changed)
verifies what it reads and reads little more than it needs. Reads that touch are joined; none is longer than a buffer.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from zlib_ng.zlib_ng import crc32_combine

from elastic.checkpoint.format.manifest import BLOCK_BYTES, Chunk, FileRecord, TensorRecord
from elastic.checkpoint.format.sharding import ITEM_BYTES, Box


@dataclass(frozen=True)
class Run:
    """Elements that lie in a row both in the box that was saved and in the one that is wanted; offsets in elements."""

    source: int
    target: int
    num_elements: int


@dataclass(frozen=True)
class Piece:
    """Bytes of a read that go into one tensor."""

    name: str
    dtype: str
    start: int
    """Of the first byte, in the read."""
    num_elements: int
    target: int
    """Of the first element, in the flat local tensor."""


@dataclass(frozen=True)
class Block:
    """Bytes with one checksum."""

    name: str
    """The tensor's, or ``header``."""
    offset: int
    """In the file."""
    num_bytes: int
    crc32: int | None
    """None: it is not taken yet, and what is read is what there is."""


@dataclass(frozen=True)
class Read:
    """One stretch of a file: whole blocks, and what is wanted of them."""

    file: str
    blocks: list[Block]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def offset(self) -> int:
        """Return where it starts in the file."""
        return self.blocks[0].offset

    @property
    def num_bytes(self) -> int:
        """Return how long it is."""
        return self.blocks[-1].offset + self.blocks[-1].num_bytes - self.offset

    @property
    def crc32(self) -> int | None:
        """Return the checksum of all of it: one sum over a long read lets other threads work longest."""
        combined = 0
        for block in self.blocks:
            if block.crc32 is None:
                return None
            combined = crc32_combine(combined, block.crc32, block.num_bytes)
        return combined


def find_runs(saved: Box, wanted: Box) -> Iterator[Run]:
    """Yield where the elements common to two boxes of a tensor lie in each, as few long runs as there are."""
    start = [max(a, b) for a, b in zip(saved.start, wanted.start, strict=True)]
    stop = [min(a + m, b + n) for a, m, b, n in zip(saved.start, saved.shape, wanted.start, wanted.shape, strict=True)]
    shape = [b - a for a, b in zip(start, stop, strict=True)]
    if any(size <= 0 for size in shape):
        return
    # the dims from `inner` on are whole in both boxes: what they span lies in a row
    inner = len(shape)
    while inner and shape[inner - 1] == saved.shape[inner - 1] == wanted.shape[inner - 1]:
        inner -= 1
    row = max(inner - 1, 0)  # and along this dim the rows follow each other
    in_saved = [a - b for a, b in zip(start, saved.start, strict=True)]
    in_wanted = [a - b for a, b in zip(start, wanted.start, strict=True)]
    num_elements = 1
    for size in shape[row:]:
        num_elements *= size
    for index in _count(shape[:row]):
        at = [*index, *[0] * (len(shape) - row)]
        yield Run(_flatten(in_saved, at, saved.shape), _flatten(in_wanted, at, wanted.shape), num_elements)


def plan_reads(
    tensors: Mapping[str, TensorRecord], wanted: Mapping[str, Box | None], *, max_bytes: int
) -> tuple[list[Read], list[str]]:
    """Return what to read so that the wanted boxes are filled, and which of them the checkpoint cannot fill.

    Args:
        wanted: this rank's box of each tensor; None: nothing of it.
        max_bytes: length of a read, at least a block.
    """
    blocks: dict[tuple[str, int], Block] = {}
    runs: list[tuple[str, int, str, TensorRecord, Run]] = []
    gaps: list[str] = []
    for name, box in wanted.items():
        if box is None:
            continue
        record, missing = tensors[name], box.num_elements
        item_bytes = ITEM_BYTES[record.dtype]
        for chunk in record.chunks:
            for run in find_runs(chunk.box, box):
                missing -= run.num_elements
                first = chunk.offset + run.source * item_bytes
                runs.append((chunk.file, first, name, record, run))
                for block in _get_blocks(name, chunk, first, first + run.num_elements * item_bytes):
                    blocks[chunk.file, block.offset] = block
        if missing:
            gaps.append(name)
    reads = _join(blocks, max_bytes=max_bytes)
    starts = [(read.file, read.offset) for read in reads]
    for file, first, name, record, run in runs:
        item_bytes = ITEM_BYTES[record.dtype]
        done = 0
        while done < run.num_elements:
            at = first + done * item_bytes
            read = reads[bisect_right(starts, (file, at)) - 1]
            num_elements = min(run.num_elements - done, (read.offset + read.num_bytes - at) // item_bytes)
            read.pieces.append(Piece(name, record.dtype, at - read.offset, num_elements, run.target + done))
            done += num_elements
    return reads, gaps


def plan_checks(tensors: Mapping[str, TensorRecord], files: Mapping[str, FileRecord], *, max_bytes: int) -> list[Read]:
    """Return reads that verify all of these tensors and the headers of these files, and fill nothing."""
    blocks = {
        (chunk.file, block.offset): block
        for name, record in tensors.items()
        for chunk in record.chunks
        for block in _get_blocks(name, chunk, chunk.offset, chunk.offset + chunk.num_bytes)
    }
    for file, record in files.items():
        blocks[file, 0] = Block("header", 0, record.header_bytes, record.header_crc32)
    return _join(blocks, max_bytes=max_bytes)


def _get_blocks(name: str, chunk: Chunk, first: int, stop: int) -> Iterator[Block]:
    """Yield the blocks of a chunk that hold the bytes from `first` to `stop` of its file."""
    for number in range((first - chunk.offset) // BLOCK_BYTES, -(-(stop - chunk.offset) // BLOCK_BYTES)):
        start = number * BLOCK_BYTES
        num_bytes = min(BLOCK_BYTES, chunk.num_bytes - start)
        yield Block(name, chunk.offset + start, num_bytes, chunk.crc32[number] if chunk.crc32 else None)


def _join(blocks: Mapping[tuple[str, int], Block], *, max_bytes: int) -> list[Read]:
    reads: list[Read] = []
    for (file, offset), block in sorted(blocks.items(), key=lambda item: item[0]):
        last = reads[-1] if reads else None
        follows = last is not None and (last.file, last.offset + last.num_bytes) == (file, offset)
        if last is not None and follows and last.num_bytes + block.num_bytes <= max_bytes:
            last.blocks.append(block)
        else:
            reads.append(Read(file, [block]))
    return reads


def _count(shape: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield all indices of a shape, the last dim fastest."""
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _count(shape[1:]):
            yield (first, *rest)


def _flatten(start: list[int], at: list[int], shape: tuple[int, ...]) -> int:
    flat = 0
    for origin, index, size in zip(start, at, shape, strict=True):
        flat = flat * size + origin + index
    return flat
