"""What the driver shows and passes on: lines or a live table in the terminal, and the rows to the sinks.

Rows get the money that only the driver's side knows: dollars, dollars per million tokens and goodput so far.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.runtime.coordinator.published import Update
from cluster.runtime.driver import Ending
from elastic.config import RunConfig
from elastic.ports import MetricSink
from elastic.sinks.console import format_row

PLAIN_EVERY_S = 5.0
"""Without a terminal, a step is printed this often; incidents always are."""


class View:
    """Takes each update of the driver, in a `with` block; `end` tells it the outcome.

    Args:
        open_sinks: called at the first update: not before this driver leads the run, because another one may.
    """

    def __init__(self, config: RunConfig, open_sinks: Callable[[], Sequence[MetricSink]]) -> None:
        self._config = config
        self._open_sinks = open_sinks
        self._sinks: Sequence[MetricSink] | None = None
        self._start_s = time.monotonic()
        self._last_plain_s = 0.0
        self._console = Console()
        self._row: Mapping[str, object] = {}
        self._live: Live | None = None
        if sys.stdout.isatty():
            self._live = Live(console=self._console, refresh_per_second=2)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop_live()
        for sink in self._sinks or ():
            sink.close()

    def update(self, update: Update) -> None:
        """Show an update and hand its rows on."""
        if self._sinks is None:
            self._sinks = self._open_sinks()
        for line in update.lines:
            self.say(line)
        for row in update.rows:
            self._write(row, update.summary)
        if self._live:
            self._live.update(self._build_table(update))
        elif update.rows and time.monotonic() - self._last_plain_s >= PLAIN_EVERY_S:
            self._last_plain_s = time.monotonic()
            self.say(format_row(self._row, total_steps=self._config.train.steps))

    def say(self, line: str) -> None:
        """Print one line, above the live table if there is one."""
        self._console.print(
            f"[{time.monotonic() - self._start_s:6.1f} s] {line}", markup=False, highlight=False, soft_wrap=True
        )

    def end(self, ending: Ending) -> None:
        """Show how it ended, and let the sinks have the final bill: nodes are paid for a little longer than trained."""
        if self._row:
            self._write({name: self._row[name] for name in ("step", "tokens")}, ending.summary)
        self._stop_live()
        per_mtoken = _show(ending.summary["usd_per_mtoken"], "{:.4f} USD per million tokens")
        self.say(f"{ending.kind}: {ending.reason}; spent {ending.summary['usd']:.4f} USD, {per_mtoken}")

    def _write(self, row: Mapping[str, object], summary: Mapping[str, Any]) -> None:
        money = {name: summary[name] for name in ("usd", "usd_per_mtoken", "goodput", "available_goodput")}
        money |= {f"usd_wasted_{cause}": usd for cause, usd in summary["usd_wasted"].items()}
        self._row = {**row, **money, "usd_wasted": sum(summary["usd_wasted"].values())}
        for sink in self._sinks or ():
            sink.write(self._row)

    def _stop_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _build_table(self, update: Update) -> Table:
        table = Table(title=f"{self._config.run}: {update.stage}", show_header=False, min_width=60)
        table.add_column(style="dim")
        table.add_column()
        nodes = sorted({worker.node[:8] for worker in update.workers})
        for name, text in (
            ("step", f"{self._row.get('step', 0)} of {self._config.train.steps}"),
            ("loss", _show(self._row.get("loss"), "{:.4f}")),
            ("tokens/s", _show(self._row.get("tokens_per_s"), "{:,.0f}")),
            ("MFU", _show(self._row.get("mfu"), "{:.1%}")),
            ("world", f"{len(update.workers)} worker(s) on {', '.join(nodes) or 'no node'} (attempt {update.attempt})"),
            ("a loss redoes", _show_redo(self._row)),
            ("spent", _show_money(update.summary)),
            ("goodput", _show(update.summary["goodput"], "{:.1%}")),
            ("incidents", str(len(update.summary["incidents"]))),
        ):
            table.add_row(name, text)
        return table


def _show(value: Any, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _show_redo(row: Mapping[str, object]) -> str:
    """What is not kept anywhere that a loss leaves: known where states are kept in memory."""
    of_trainer, of_node = row.get("redo_steps_trainer_lost"), row.get("redo_steps_node_lost")
    return "-" if of_node is None else f"{of_trainer} step(s) if a trainer is lost now, {of_node} if a node is"


def _show_money(summary: Mapping[str, Any]) -> str:
    per_mtoken = _show(summary["usd_per_mtoken"], "{:.4f} USD per million tokens")
    return f"{summary['usd']:.4f} USD ({per_mtoken})"
