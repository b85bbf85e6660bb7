"""From a stream of documents to shards of equal length."""

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic.data.preparation.encoder import Encoded, Encoder
from elastic.data.prepared.format import Shard, Split, SplitInfo, Tokens, write_shard


class SplitWriter:
    """Collects the token stream of one split in a buffer of one shard, and writes the buffer when it is full."""

    def __init__(self, folder: Path, split: Split, encoder: Encoder, shard_tokens: int) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self.num_spelled = 0
        self.spelled: frozenset[str] = frozenset()
        self.counts = np.zeros(encoder.vocab_size, np.int64)
        self._folder = folder
        self._split = split
        self.left_out: Counter[str] = Counter()
        self.first_left_out: dict[str, str] = {}
        self.num_counted = 0
        self._buffer: Tokens = np.empty(shard_tokens, encoder.dtype)
        self._counted = np.empty(shard_tokens, np.bool_) if encoder.has_counted else None
        self._filled = 0
        self._row_ends: list[npt.NDArray[np.int64]] = []  # in the stream of the whole split
        self._shards: list[Shard] = []

    def add(self, part: Encoded) -> None:
        """Append whole documents."""
        self._row_ends.append(self.num_tokens + np.cumsum(part.lengths))
        self.num_documents += len(part.lengths)
        self.num_spelled += part.num_spelled
        self.spelled |= part.spelled
        self.counts += np.bincount(part.tokens, minlength=len(self.counts))
        self.left_out.update(part.left_out)
        self.first_left_out = {**part.first_left_out, **self.first_left_out}
        tokens, counted = part.tokens, part.counted
        self.num_counted += len(tokens) if counted is None else int(counted.sum())
        while len(tokens):
            taken = tokens[: len(self._buffer) - self._filled]
            inside = slice(self._filled, self._filled + len(taken))
            self._buffer[inside] = taken
            if self._counted is not None and counted is not None:
                self._counted[inside], counted = counted[: len(taken)], counted[len(taken) :]
            self._filled += len(taken)
            self.num_tokens += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == len(self._buffer):
                self._flush()

    def finish(self) -> SplitInfo:
        """Write what is left and return the shards."""
        if self._filled:
            self._flush()
        return SplitInfo(num_documents=self.num_documents, num_tokens=self.num_tokens, shards=tuple(self._shards))

    def _flush(self) -> None:
        ends = np.concatenate(self._row_ends)
        inside = ends < self.num_tokens
        offsets = np.concatenate([[0], ends[inside] - (self.num_tokens - self._filled), [self._filled]])
        counted = None if self._counted is None else self._counted[: self._filled]
        path = self._folder / f"{self._split}-{len(self._shards):05d}.arrow"
        self._shards.append(write_shard(path, self._buffer[: self._filled], offsets.astype(np.int32), counted))
        self._row_ends = [ends[ends > self.num_tokens]]
        self._filled = 0
