"""Prepared data for people to look at: what a split holds, a sample as text, and what is wrong with a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from elastic.data.checksums import find_damaged_files
from elastic.data.folder import LocalFolder
from elastic.data.format import TOKENIZER_FILE, Shard, Split
from elastic.data.samples import Sample
from elastic.data.shards import Dataset
from elastic.data.tokenizer import parse_tokenizer
from elastic.errors import DataError

_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a sample that is of one document."""

    text: str
    num_tokens: int
    begins: bool
    """The document begins here; else it went on from before."""
    ends: bool
    uncounted: str
    """What of the text does not count for the loss; empty: all counts."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the documents of a split, in deciles from the shortest to the longest."""

    deciles: tuple[int, ...]
    mean: float


def load_own_tokenizer(dataset: Dataset) -> Tokenizer:
    """Return the tokenizer that lies with the shards."""
    return parse_tokenizer(dataset.folder.read_file(TOKENIZER_FILE), f"{dataset.folder}/{TOKENIZER_FILE}")


def decode_sample(dataset: Dataset, split: Split, sample: Sample, tokenizer: Tokenizer) -> list[Passage]:
    """Return the text of a sample, document by document."""
    passages: list[Passage] = []
    for piece in sample.pieces:
        count = piece.num_targets + 1
        tokens = dataset.read_tokens(split, piece.position, count)
        counted = dataset.read_counted(split, piece.position, count)
        starts = dataset.find_documents(split, piece.position, count) - piece.position
        borders = [0, *starts[starts > 0].tolist(), count]
        for begin, end in pairwise(borders):
            part = tokens[begin:end]
            silent = part[:0] if counted is None else part[~counted[begin:end]]
            passages.append(
                Passage(
                    text=_decode(tokenizer, part),
                    num_tokens=end - begin,
                    begins=begin in starts,
                    ends=int(part[-1]) == dataset.info.eot_id,
                    uncounted=_decode(tokenizer, silent),
                )
            )
    return passages


def _decode(tokenizer: Tokenizer, tokens: npt.NDArray[np.int64]) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def measure_lengths(dataset: Dataset, split: Split) -> Lengths | None:
    """Return how long documents are; a document that two shards share counts as two. None without any."""
    shards = dataset.info.get_split(split).shards
    lengths = np.concatenate([np.diff(dataset.folder.read_row_offsets(shard)) for shard in shards] or [np.empty(0)])
    if not len(lengths):
        return None
    deciles = np.quantile(lengths, np.linspace(0, 1, 11), method="nearest").astype(int)
    return Lengths(deciles=tuple(deciles.tolist()), mean=float(lengths.mean()))


def find_damage(folder: Path, dataset: Dataset) -> Iterator[str]:
    """Read all of a folder on a file system; yield what is wrong with it, a line each.

    Beyond the bytes' checksums, the content is looked at: that ids have a row in the vocabulary, that rows are whole
    documents, and that there are as many documents and tokens as `dataset.json` says.
    """
    damaged = dict(find_damaged_files(folder, dataset.info))
    yield from damaged.values()
    for split in ("train", "val"):
        info = dataset.info.get_split(split)
        if not damaged.keys() & {shard.file for shard in info.shards}:
            yield from _check_content(LocalFolder(folder), dataset, split)


def _check_content(folder: LocalFolder, dataset: Dataset, split: Split) -> Iterator[str]:
    info, is_open, num_documents = dataset.info.get_split(split), False, 0
    for shard in info.shards:
        try:
            offsets = folder.read_row_offsets(shard)
        except DataError as error:
            yield str(error)
            return
        if offsets[0] != 0 or offsets[-1] != shard.num_tokens or (np.diff(offsets) <= 0).any():
            yield f"{folder}/{shard.file}: its rows do not tile its {shard.num_tokens:,} tokens"
            return
        num_documents += len(offsets) - 1 - is_open
        is_open = int(folder.read_tokens(shard, shard.num_tokens - 1, 1)[0]) != dataset.info.eot_id
        ends = folder.read_tokens(shard, 0, shard.num_tokens)[offsets[1 : len(offsets) - is_open] - 1]
        if (ends != dataset.info.eot_id).any():
            yield f"{folder}/{shard.file}: {int((ends != dataset.info.eot_id).sum()):,} documents have no end"
        largest = _find_largest(folder, shard)
        if largest >= dataset.info.needed_vocab_size:
            yield (
                f"{folder}/{shard.file} holds the token id {largest}, and the vocabulary ends at "
                f"{dataset.info.needed_vocab_size - 1}"
            )
    if is_open:
        yield f"{folder}: the last document of {split} has no end"
    if num_documents != info.num_documents:
        yield f"{folder}: {split} holds {num_documents:,} documents, dataset.json says {info.num_documents:,}"


def _find_largest(folder: LocalFolder, shard: Shard) -> int:
    parts = range(0, shard.num_tokens, _TOKENS_AT_ONCE)
    return max(int(folder.read_tokens(shard, at, _TOKENS_AT_ONCE).max()) for at in parts)
