"""Rows without text: what every reader does about them.

A null, a missing key, a line that is no JSON or no UTF-8 happens in data of others. Such a row is left out, counted by
its kind and told; more than a share of them is a wrong key or a broken file, and ends the job.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from elastic.errors import DataError

_ROWS_TO_JUDGE = 1000
"""A share of fewer rows says little; at the end of a file it is all there is to say."""


TakeRow = Callable[[object, str], "str | NoText"]
"""Makes one text of a row that is read at a place, or says what is wrong with it."""


@dataclass(frozen=True)
class NoText:
    """A row that has none."""

    where: str
    """File and line, row or item."""
    why: str
    has_key: bool
    """The text's place is there, with nothing in it."""
    kind: str = "have no text"
    """What is wrong with it, and with others of its kind; completes "rows, which"."""


class Tally:
    """Passes texts on and counts what is left out, over all files of a corpus.

    Args:
        max_missing: the share of rows that may be without text, in each file and in all; one row always may.
    """

    def __init__(self, max_missing: float) -> None:
        self.max_missing = max_missing
        self._num_rows = 0
        self._missing: Counter[str] = Counter()
        self._first: dict[str, NoText] = {}

    def read(self, rows: Iterable[str | NoText]) -> Iterator[str]:
        """Yield the texts of one file.

        Raises:
            DataError: too many rows have none.
        """
        num_texts, missing, first = 0, 0, None
        for row in rows:
            if isinstance(row, str):
                num_texts += 1
                yield row
                continue
            missing += 1
            first = first or row
            self._missing[row.kind] += 1
            self._first.setdefault(row.kind, row)
            if num_texts + missing >= _ROWS_TO_JUDGE:
                self._judge(num_texts + missing, missing, first)
        self._num_rows += num_texts + missing
        if first is None:
            return
        if not num_texts and not first.has_key:
            raise self._fail(missing, missing, first)
        self._judge(num_texts + missing, missing, first)

    def finish(self) -> list[str]:
        """Return what was left out, a line for each kind, once all files are read.

        Raises:
            DataError: too many rows had no text.
        """
        if not self._first:
            return []
        self._judge(self._num_rows, self._missing.total(), next(iter(self._first.values())))
        return [
            f"left out {self._missing[kind]:,} of {self._num_rows:,} rows, which {kind}; the first: "
            f"{first.where} {first.why}"
            for kind, first in self._first.items()
        ]

    def _judge(self, num_rows: int, missing: int, first: NoText) -> None:
        if missing > max(1, self.max_missing * num_rows):
            raise self._fail(num_rows, missing, first)

    def _fail(self, num_rows: int, missing: int, first: NoText) -> DataError:
        return DataError(
            f"{first.where} {first.why}, as {missing:,} of {num_rows:,} rows so far: more than a share of "
            f"{self.max_missing:g} is no accident. Name the right key with --text-key, repair the file, or allow more "
            "with --max-missing."
        )
