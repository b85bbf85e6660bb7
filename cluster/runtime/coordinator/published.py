"""What the coordinator lets its driver know: written by its own threads, handed out to whoever polls."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster import controller
from cluster.types import Done, Worker

_MOST_LINES = 10_000
"""Of a driver that is gone for long, the oldest lines are forgotten; the logs of the nodes have them."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the driver learns in one poll."""

    rows: list[dict[str, Any]]
    lines: list[str]
    stage: str
    attempt: int
    workers: list[Worker]
    """The trainers of the current world, by rank; empty while it forms."""
    summary: dict[str, Any]
    done: dict[str, Any] | None


class Published:
    """Rows and lines since the last poll, and how the run stands; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._lines = deque[str](maxlen=_MOST_LINES)
        self._stage: controller.Stage = "waiting"
        self._attempt = 0
        self._workers: list[Worker] = []
        self._done: Done | None = None

    @property
    def done(self) -> Done | None:
        """How the run has ended; None: it goes on."""
        return self._done

    def end(self, done: Done) -> None:
        """Say how the run has ended; what is said first counts."""
        with self._lock:
            self._done = self._done or done

    def say(self, line: str) -> None:
        """Add a line for people."""
        with self._lock:
            self._lines.append(line)

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a finished step."""
        with self._lock:
            self._rows.append(row)

    def enter(self, stage: controller.Stage, attempt: int, workers: Sequence[Worker]) -> None:
        """Say how the run stands."""
        with self._lock:
            self._stage, self._attempt, self._workers = stage, attempt, list(workers)

    def take(self, summary: Mapping[str, Any]) -> Update:
        """Return what is new; the next call returns what came after this one.

        Args:
            summary: of the run records.
        """
        with self._lock:
            rows, self._rows = self._rows, []
            lines = list(self._lines)
            self._lines.clear()
            return Update(
                rows=rows,
                lines=lines,
                stage=self._stage,
                attempt=self._attempt,
                workers=self._workers,
                summary=dict(summary),
                done=asdict(self._done) if self._done else None,
            )
