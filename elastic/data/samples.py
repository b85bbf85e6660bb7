"""What the samples of a split are: which tokens a model reads, and which it is to predict. No torch here."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from elastic.data.prepared.format import Split
from elastic.data.prepared.shards import Dataset

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a batch."""

    tokens: Ints
    labels: Ints
    """What follows each token."""
    counted: npt.NDArray[np.bool_] | None
    """Which labels count for the loss; None: all."""
    pieces: tuple["Piece", ...]
    """Where it is from, in the order of the row."""
    starts: npt.NDArray[np.int32] | None = None
    """Where in the row something begins that must not see what is before it, 0 first; None: nowhere but there."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens on end of a split's stream."""

    position: int
    num_targets: int
    """One more token is read."""


class Samples(Protocol):
    """The samples of one split, numbered from 0."""

    @property
    def padding_share(self) -> float:
        """How much of them is padding."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, index: int) -> Sample:
        """Return one of them."""
        ...

    def read_ahead(self, index: int) -> None:
        """Take note that one of them will be read soon."""
        ...


class StreamSamples:
    """The stream of a split, cut at every `seq_len` tokens; documents run into each other."""

    def __init__(self, dataset: Dataset, split: Split, seq_len: int) -> None:
        self._dataset = dataset
        self._split: Split = split
        self._seq_len = seq_len

    def __len__(self) -> int:
        return self._dataset.num_samples(self._split, self._seq_len)

    @property
    def padding_share(self) -> float:
        """None is."""
        return 0.0

    def read(self, index: int) -> Sample:
        """See the Protocol."""
        tokens = self._dataset.read(self._split, index, self._seq_len)
        piece = Piece(position=index * self._seq_len, num_targets=self._seq_len)
        counted = self._dataset.read_counted(self._split, piece.position + 1, piece.num_targets)
        return Sample(tokens=tokens[:-1], labels=tokens[1:], counted=counted, pieces=(piece,))

    def read_ahead(self, index: int) -> None:
        """See the Protocol."""
        self._dataset.read_ahead(self._split, index * self._seq_len, self._seq_len + 1)
