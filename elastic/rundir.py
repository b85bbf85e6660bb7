"""The files of one run's directory, and how a line reaches one of them.

`metrics.jsonl` and its sisters are the truth about a run: one writer each, whole lines only, flushed as written.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunDir:
    """Paths below `<storage>/<run>/` (CONTRACT: others read these names)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def incidents(self) -> Path:
        return self.root / "incidents.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def samples(self, *, attempt: int, rank: int) -> Path:
        return self.root / f"samples-{attempt}-{rank}.jsonl"


def format_utc(time_s: float) -> str:
    """Return a Unix time as ISO 8601 in UTC with milliseconds, such as ``2026-11-24T01:02:03.004Z``."""
    moment = datetime.fromtimestamp(round(time_s * 1000) / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def parse_utc(text: str) -> float:
    """Return the Unix time of what `format_utc` wrote."""
    return datetime.fromisoformat(text).timestamp()


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one JSON line with one write, so that a reader never sees half of a line that was written whole."""
    line = (json.dumps(row, allow_nan=True) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a JSONL file; a last line cut short by a crash is left out, a missing file is empty."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:  # a torn line that a later attempt wrote on
                continue
