"""Prepared data for people to look at: what a split holds, a sample as text, and what is wrong with a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from elastic.data.prepared.checksums import check_shard_file, check_tokenizer_file
from elastic.data.prepared.folder import LocalFolder
from elastic.data.prepared.format import SPLITS, TOKENIZER_FILE, Shard, Split
from elastic.data.prepared.shards import Dataset
from elastic.data.prepared.tokenizer import parse_tokenizer
from elastic.data.samples import Sample
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


def find_damage(dataset: Dataset) -> Iterator[str]:
    """Read all of a prepared folder; yield what is wrong with it, a line each.

    Beyond the bytes' checksums, the content is looked at: that ids have a row in the vocabulary, that rows are whole
    documents, and that there are as many documents and tokens as `dataset.json` says. A shard in an object store is
    copied to this machine, and away again.
    """
    yield from check_tokenizer_file(dataset.folder, dataset.info)
    for split in SPLITS:
        content, is_whole = _Content(dataset), True
        for shard in dataset.info.get_split(split).shards:
            try:
                with dataset.folder.borrow(shard) as path:
                    damage = list(check_shard_file(path, shard, name=f"{dataset.folder}/{shard.file}"))
                    damage = damage or list(content.check(LocalFolder(path.parent), shard))
            except DataError as error:
                damage = [str(error)]
            is_whole = is_whole and not damage
            yield from damage
        if is_whole:
            yield from content.finish(split)


class _Content:
    """Looks at the shards of a split, one after the other."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._is_open = False
        self._num_documents = 0

    def check(self, folder: LocalFolder, shard: Shard) -> Iterator[str]:
        """Yield what is wrong with a shard, which lies in this folder now."""
        name, eot_id = f"{self._dataset.folder}/{shard.file}", self._dataset.info.eot_id
        try:
            offsets = folder.read_row_offsets(shard)
        except DataError as error:
            yield str(error)
            return
        if offsets[0] != 0 or offsets[-1] != shard.num_tokens or (np.diff(offsets) <= 0).any():
            yield f"{name}: its rows do not tile its {shard.num_tokens:,} tokens"
            return
        self._num_documents += len(offsets) - 1 - self._is_open
        self._is_open = int(folder.read_tokens(shard, shard.num_tokens - 1, 1)[0]) != eot_id
        ends = folder.read_tokens(shard, 0, shard.num_tokens)[offsets[1 : len(offsets) - self._is_open] - 1]
        if num_open := int((ends != eot_id).sum()):
            yield f"{name}: {num_open:,} documents have no end"
        largest = _find_largest(folder, shard)
        if largest >= self._dataset.info.needed_vocab_size:
            last = self._dataset.info.needed_vocab_size - 1
            yield f"{name} holds the token id {largest}, and the vocabulary ends at {last}"

    def finish(self, split: Split) -> Iterator[str]:
        """Yield what is wrong with all of them together."""
        said = self._dataset.info.get_split(split).num_documents
        if self._is_open:
            yield f"{self._dataset.folder}: the last document of {split} has no end"
        if self._num_documents != said:
            yield f"{self._dataset.folder}: {split} holds {self._num_documents:,} documents, dataset.json says {said:,}"


def _find_largest(folder: LocalFolder, shard: Shard) -> int:
    parts = range(0, shard.num_tokens, _TOKENS_AT_ONCE)
    return max(int(folder.read_tokens(shard, at, _TOKENS_AT_ONCE).max()) for at in parts)
