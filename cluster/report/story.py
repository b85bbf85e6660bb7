"""What a run's files tell: read once, tolerant of files that are missing or still being written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import yaml

from cluster.ledger import LedgerRow, Totals, read_ledger, totals_of
from elastic.records.attempts import End, final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows

Row = Mapping[str, Any]
State = Literal["starting", "running", "silent"] | End

_SILENT_AFTER_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Story:
    """A run as its files tell it; every part may be empty."""

    name: str
    config: Mapping[str, Any]
    all_rows: Sequence[Row]
    """As written: steps that were done again are in here twice."""
    rows: Sequence[Row]
    """One per step, the last that was written."""
    attempts: Sequence[Row]
    incidents: Sequence[Row]
    tiles: Sequence[LedgerRow]
    totals: Totals

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, if the configuration is known."""
        return self.config.get("train", {}).get("steps")

    @property
    def last_update_s(self) -> float | None:
        """Unix time of the newest sign of life."""
        times = [parse_utc(row["time_utc"]) for row in self.all_rows[-1:]]
        times += [parse_utc(row["end_utc"]) for row in self.attempts[-1:]]
        times += [max(tile.end_ms for tile in self.tiles) / 1000] if self.tiles else []
        return max(times, default=None)

    @property
    def step_s(self) -> float | None:
        """Usual time of one of the newest steps."""
        return median(row["step_s"] for row in self.rows[-50:]) if self.rows else None

    @property
    def bad_steps(self) -> Sequence[int]:
        """Steps that were not applied, because their loss was not finite or a spike."""
        return [row["step"] for row in self.rows if "bad_step" in row]

    def get_last(self, column: str) -> Any:
        """Return the newest value of a column that not every row has; None if no row has it, or it is not finite."""
        return next((row[column] for row in reversed(self.rows) if column in row), None)

    def get_state(self, now_s: float) -> State:
        """Return how the newest attempt ended, or whether it is still heard of."""
        trained = self.all_rows[-1]["attempt"] if self.all_rows else 0
        if self.attempts and self.attempts[-1]["attempt"] >= trained:
            return self.attempts[-1]["end"]
        if self.last_update_s is None or self.step_s is None:
            return "starting"
        patience_s = max(_SILENT_AFTER_S, 10 * self.step_s)
        return "silent" if now_s - self.last_update_s > patience_s else "running"


def read_story(run_dir: RunDir) -> Story:
    """Read all files of a run."""
    config: Any = yaml.safe_load(run_dir.config.read_text(encoding="utf-8")) if run_dir.config.exists() else None
    all_rows = list(read_rows(run_dir.metrics))
    tiles = read_ledger(read_rows(run_dir.ledger))
    return Story(
        name=run_dir.root.resolve().name,
        config=config if isinstance(config, dict) else {},
        all_rows=all_rows,
        rows=final_rows(all_rows),
        attempts=sorted(read_rows(run_dir.attempts), key=lambda row: row["attempt"]),
        incidents=list(read_rows(run_dir.incidents)),
        tiles=tiles,
        totals=totals_of(tiles),
    )
