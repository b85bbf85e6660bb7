"""Rows on their way to a run's files, from a thread of its own: a slow or full storage keeps nobody else waiting."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path

from elastic.errors import StaleGenerationError, StorageError
from elastic.records.rundir import append_row, end_torn_line

PATIENCE_S = 60.0
"""As long as a generation or a checkpoint is tried for: then the run ends, resumable, rather than leave no trace."""
_RETRY_S = 0.5


class RowWriter:
    """Appends rows in the order in which they come; one that cannot be written is tried again, and those after it wait.

    Args:
        check_lead: called before each row; raises if another process leads this run by now.
        on_failure: takes, once, why a row could not be written within `patience_s`, on this thread. It is tried on.
        say: takes a line for people when rows have to wait.
    """

    def __init__(
        self,
        *,
        check_lead: Callable[[], None],
        on_failure: Callable[[BaseException], None],
        say: Callable[[str], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._check_lead, self._on_failure, self._say, self._patience_s = check_lead, on_failure, say, patience_s
        self._rows = deque[tuple[Path, Mapping[str, object]]]()
        self._changed = threading.Condition()
        self._problem = ""
        threading.Thread(target=self._work, name="rows-out", daemon=True).start()

    def append(self, path: Path, row: Mapping[str, object]) -> None:
        """Have a row written after those that came before it."""
        with self._changed:
            self._rows.append((path, row))
            self._changed.notify_all()

    def get_unwritten(self) -> dict[str, int]:
        """Return how many rows of each file are not written."""
        with self._changed:
            return dict(Counter(path.name for path, _ in self._rows))

    def get_problem(self) -> str:
        """Return what keeps the next row from being written; empty if nothing does."""
        return self._problem

    def wait(self, timeout_s: float) -> bool:
        """Wait until all rows are written; False if they are not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._rows, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows)
                path, row = self._rows[0]
            try:
                self._write(path, row)
            except StaleGenerationError as error:  # the files are another one's, and so is what they should say
                with self._changed:
                    self._rows.clear()
                    self._changed.notify_all()
                self._on_failure(error)
                continue
            except BaseException as error:
                self._on_failure(error)
                return
            with self._changed:
                if self._rows:
                    self._rows.popleft()
                self._changed.notify_all()

    def _write(self, path: Path, row: Mapping[str, object]) -> None:
        """Return once the row is in its file."""
        since_s, is_told = time.monotonic(), False
        while True:
            try:
                self._check_lead()
                append_row(path, row)
                self._problem = ""
                return
            except StaleGenerationError:
                raise
            except StorageError as error:
                if not self._problem:
                    self._say(f"rows of {path.name} wait: {error}")
                self._problem = str(error)
                if not is_told and time.monotonic() - since_s > self._patience_s:
                    is_told = True
                    self._on_failure(error)
            time.sleep(_RETRY_S)
            _end_torn(path)


def _end_torn(path: Path) -> None:
    """End what a failed write may have left of its line."""
    try:
        end_torn_line(path)
    except OSError:  # as for the row itself: it is tried again
        return
