"""Rows without text: what every reader does about them.

A null, a missing key or a value that is no text happens in data of others. Such a row is left out, counted and told;
more than a share of them is a wrong key or a broken file, and ends the job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elastic.errors import DataError

_ROWS_TO_JUDGE = 1000
"""A share of fewer rows says little; at the end of a file it is all there is to say."""


@dataclass(frozen=True)
class NoText:
    """A row that has none."""

    where: str
    """File and line, row or item."""
    why: str
    has_key: bool
    """The text's place is there, with nothing in it."""


class Tally:
    """Passes texts on and counts what is left out, over all files of a corpus.

    Args:
        max_missing: the share of rows that may be without text, in each file and in all; one row always may.
    """

    def __init__(self, max_missing: float) -> None:
        self._max_missing = max_missing
        self._num_rows = 0
        self._num_missing = 0
        self._first: NoText | None = None

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
            if num_texts + missing >= _ROWS_TO_JUDGE:
                self._judge(num_texts + missing, missing, first)
        self._num_rows += num_texts + missing
        if first is None:
            return
        self._num_missing += missing
        self._first = self._first or first
        if not num_texts and not first.has_key:
            raise self._fail(missing, missing, first)
        self._judge(num_texts + missing, missing, first)

    def finish(self) -> str | None:
        """Return what was left out, in a line, once all files are read.

        Raises:
            DataError: too many rows had no text.
        """
        if self._first is None:
            return None
        self._judge(self._num_rows, self._num_missing, self._first)
        return (
            f"left out {self._num_missing:,} of {self._num_rows:,} rows, which have no text; the first: "
            f"{self._first.where} {self._first.why}"
        )

    def _judge(self, num_rows: int, missing: int, first: NoText) -> None:
        if missing > max(1, self._max_missing * num_rows):
            raise self._fail(num_rows, missing, first)

    def _fail(self, num_rows: int, missing: int, first: NoText) -> DataError:
        return DataError(
            f"{first.where} {first.why}, as {missing:,} of {num_rows:,} rows so far: more than a share of "
            f"{self._max_missing:g} is no accident. Name the right key with --text-key, repair the file, or allow more "
            "with --max-missing."
        )
