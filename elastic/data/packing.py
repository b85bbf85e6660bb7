"""Documents in rows of equal length, best-fit, each row from documents that lie near each other.

The stream of a split is cut into windows of `WINDOW_ROWS * seq_len` tokens. The documents that begin in a window are
packed together, by themselves: what is longer than a row fills rows of its own first, and what is left of all goes,
the longest first, into the row that has the least room for it (best-fit decreasing; H. Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv:2404.10830, which packs documents for the same reason). So any row can be found by
packing one window, and all that must be known of the others is how many rows they make: the index.

Changing anything here changes which documents a step of a run in flight has; a test holds golden values.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from elastic.data.prepared.format import Split
from elastic.data.prepared.shards import Dataset
from elastic.data.samples import Piece, Sample

WINDOW_ROWS = 128
_WINDOWS_KEPT = 32
_WINDOWS_AT_ONCE = 64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Index:
    """How many rows the windows of a split make."""

    ends: Ints
    """Of each window: its rows and those of all windows before."""
    num_targets: int
    """Labels in all rows; the rest is padding."""

    def dump(self) -> bytes:
        """Return it as bytes."""
        return np.array([self.num_targets, *self.ends], "<i8").tobytes()


def parse_index(content: bytes) -> Index:
    """Return what `Index.dump` made bytes of."""
    numbers = np.frombuffer(content, "<i8").astype(np.int64)
    return Index(num_targets=int(numbers[0]), ends=numbers[1:])


class PackedSamples:
    """The documents of a split, packed; the index is built when it is first needed, unless one is given."""

    def __init__(self, dataset: Dataset, split: Split, seq_len: int) -> None:
        self.index: Index | None = None
        self._dataset = dataset
        self._split: Split = split
        self._seq_len = seq_len
        self._num_tokens = dataset.info.get_split(split).num_tokens
        self._pack_window = lru_cache(_WINDOWS_KEPT)(self._pack_one)

    def __len__(self) -> int:
        ends = self.get_index().ends
        return int(ends[-1]) if len(ends) else 0

    @property
    def index_name(self) -> str:
        """What the index depends on, beside the data."""
        return f"packed-{self._split}-{self._seq_len}-{WINDOW_ROWS}"

    @property
    def padding_share(self) -> float:
        """How much of the rows is padding."""
        return 1 - self.get_index().num_targets / max(len(self) * self._seq_len, 1)

    def get_index(self) -> Index:
        """Return the index, which takes about a microsecond per document to build."""
        if self.index is None:
            self.index = self._build_index()
        return self.index

    def read(self, index: int) -> Sample:
        """See `Samples`."""
        return self._fill(self._find_pieces(index))

    def read_ahead(self, index: int) -> None:
        """See `Samples`."""
        for piece in self._find_pieces(index):
            self._dataset.read_ahead(self._split, piece.position, piece.num_targets + 1)

    def _find_pieces(self, index: int) -> list[Piece]:
        ends = self.get_index().ends
        window = int(np.searchsorted(ends, index, side="right"))
        first = int(ends[window - 1]) if window else 0
        return self._pack_window(window)[index - first]

    def _fill(self, pieces: Sequence[Piece]) -> Sample:
        tokens, labels = np.zeros((2, self._seq_len), np.int64)
        counted, filled, starts = np.zeros(self._seq_len, np.bool_), 0, list[int]()
        for piece in pieces:
            inside = slice(filled, filled + piece.num_targets)
            found = self._dataset.read_tokens(self._split, piece.position, piece.num_targets + 1)
            counts = self._dataset.read_counted(self._split, piece.position + 1, piece.num_targets)
            tokens[inside], labels[inside] = found[:-1], found[1:]
            counted[inside] = True if counts is None else counts
            starts.append(filled)
            filled += piece.num_targets
        if filled < self._seq_len:
            starts.append(filled)
        return Sample(
            tokens=tokens, labels=labels, counted=counted, pieces=tuple(pieces), starts=np.array(starts, np.int32)
        )

    def _build_index(self) -> Index:
        sizes: list[int] = []
        num_targets = 0
        self._dataset.read_all_row_offsets(self._split)
        for first in range(0, self._num_windows, _WINDOWS_AT_ONCE):
            for borders in self._find_borders(first, min(first + _WINDOWS_AT_ONCE, self._num_windows)):
                lengths = np.diff(borders) - 1
                num_targets += int(lengths.sum())
                rests = lengths % self._seq_len
                sizes.append(int((lengths // self._seq_len).sum()) + count_rows(rests[rests > 0], self._seq_len))
        return Index(ends=np.cumsum(np.array(sizes, np.int64)), num_targets=num_targets)

    @property
    def _num_windows(self) -> int:
        return -(-self._num_tokens // (WINDOW_ROWS * self._seq_len))

    def _find_borders(self, first: int, end: int) -> list[Ints]:
        """Return, of each window, where the documents begin that begin in it, and where the last of them ends."""
        unit = WINDOW_ROWS * self._seq_len
        limit = min(end * unit, self._num_tokens)
        starts = self._dataset.find_documents(self._split, first * unit, limit - first * unit)
        after = self._find_next(limit)
        cuts = np.searchsorted(starts, np.arange(first, end + 1) * unit)
        whole = np.append(starts, after)
        return [whole[low : high + 1] if high > low else whole[:0] for low, high in pairwise(cuts.tolist())]

    def _find_next(self, position: int) -> int:
        """Return where the first document begins from a position on, or where the stream ends."""
        count = self._seq_len
        while position < self._num_tokens:
            found = self._dataset.find_documents(self._split, position, min(count, self._num_tokens - position))
            if len(found):
                return int(found[0])
            position, count = position + count, 2 * count
        return self._num_tokens

    def _pack_one(self, window: int) -> list[list[Piece]]:
        (borders,) = self._find_borders(window, window + 1)
        full: list[list[Piece]] = []
        rests: list[Piece] = []
        for start, end in pairwise(borders.tolist()):
            num_full, num_left = divmod(end - 1 - start, self._seq_len)
            # a piece's last label is read again, as the first token of the next
            full += [[Piece(position=start + n * self._seq_len, num_targets=self._seq_len)] for n in range(num_full)]
            if num_left:
                rests.append(Piece(position=end - 1 - num_left, num_targets=num_left))
        lengths = np.array([piece.num_targets for piece in rests], np.int64)
        return full + [[rests[index] for index in row] for row in pack(lengths, self._seq_len)]


def pack(lengths: Ints, capacity: int) -> list[list[int]]:
    """Return the rows, each with the indices of what is in it, ascending; best-fit, the longest first.

    Args:
        lengths: each at least 1 and at most `capacity`.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # of which there is a row, ascending
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[place], rows_by_room[room]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := room - length:
            if left not in rows_by_room:
                insort(rooms, left)
                rows_by_room[left] = []
            rows_by_room[left].append(row)
    return [sorted(row) for row in rows]


def count_rows(lengths: Ints, capacity: int) -> int:
    """Return how many rows `pack` makes, in a tenth of its time."""
    num_rows, rooms = 0, list[int]()
    for length in np.sort(lengths)[::-1].tolist():
        place = bisect_left(rooms, length)
        if place < len(rooms):
            left = rooms.pop(place) - length
        else:
            num_rows += 1
            left = capacity - length
        if left:
            insort(rooms, left)
    return num_rows
