"""The end of a run's records: the last rows are brought to the storage for as long as that has patience for.

Nobody trains any more by then, and a run that is over but for its last rows is nothing to start anew for. So a storage
that is away is waited for, longer than anything else waits for it, and what is not there in the end is named. Where the
head's disk goes with the run, as on Kubernetes, this is the last chance that the rows have.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cluster.runtime.coordinator.records.row_writer import RowWriter
from cluster.runtime.coordinator.records.run_records import RunRecords
from elastic.errors import SolventError, StaleGenerationError
from elastic.records.spool import OpenRun
from elastic.storage import is_url

CLOSE_PATIENCE_S = 300.0
"""Five times what a storage is waited for while the run goes on."""
FAILED_PATIENCE_S = 30.0
"""A run that failed, maybe on this very storage, was patient before."""
_RETRY_S = 0.5
_SAY_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Closing:
    """How far the closing is."""

    is_over: bool
    missing: str
    """What did not reach the storage, why, and what to do; empty if nothing is missing by now."""
    summary: dict[str, Any]


class ClosingUp:
    """Closes the records of a run. One thread calls `bring_rows` and then `end`, any may do the rest.

    Args:
        say: takes a line for people while rows wait.
    """

    def __init__(self, run: OpenRun, *, records: RunRecords, writer: RowWriter, say: Callable[[str], None]) -> None:
        self._run, self._records, self._writer, self._say = run, records, writer, say
        self._problem = ""
        self._is_over = threading.Event()

    def get_state(self) -> Closing:
        """Return how far it is."""
        return Closing(is_over=self._is_over.is_set(), missing=self._describe(), summary=self._records.summary())

    def wait(self, timeout_s: float) -> None:
        """Wait until it is over, but no longer than this."""
        self._is_over.wait(timeout_s)

    def bring_rows(self, patience_s: float) -> None:
        """Bring all rows to the storage, or give up."""
        start_s = said_s = time.monotonic()
        while True:
            try:
                self._problem = ""
                self._records.close(time.time())
                if self._writer.wait(_RETRY_S):
                    self._run.push()
                    return
            except StaleGenerationError:  # the files are another one's now
                return
            except (OSError, SolventError) as error:
                self._problem = str(error)
            now_s = time.monotonic()
            if now_s > start_s + patience_s:
                return
            if now_s > said_s + _SAY_EVERY_S and (missing := self._describe()):
                said_s = now_s
                self._say(f"the run is over, and its last rows wait: {missing}")
            time.sleep(_RETRY_S)

    def end(self, opened: ExitStack) -> None:
        """Let go of what the run had open."""
        if not self._problem:
            try:
                opened.close()
            except (OSError, SolventError) as error:
                self._problem = str(error)
        self._is_over.set()

    def _describe(self) -> str:
        missing = self._writer.get_unwritten()
        with contextlib.suppress(OSError):  # the spool is gone with all that it held: closed
            for file, num_rows in self._run.count_unpushed().items():
                missing[file] = missing.get(file, 0) + num_rows
        if not missing:
            return self._problem
        rows = ", ".join(f"{num_rows} row(s) of {file}" for file, num_rows in sorted(missing.items()))
        why = self._problem or self._writer.get_problem() or "the storage takes its time"
        where = f"They wait in {self._run.dir.root}" if is_url(self._run.storage.url) else "They are in no file"
        return f"{rows} did not reach {self._run.storage.url}: {why.rstrip('.')}. {where}"
