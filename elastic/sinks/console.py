"""Plain lines for people and log collectors."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from elastic.config import RunConfig
from elastic.records.rundir import RunDir

OPENED_BY = ("rank0",)  # a driver has a table of its own

_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss", lambda v: f"{v:.4f}"),
    ("bad_step", "NOT APPLIED:", lambda v: str(v).replace("_", " ")),
    ("val_loss", "val loss", lambda v: f"{v:.4f}"),
    ("grad_norm", "grad norm", lambda v: f"{v:.3f}"),
    ("lr", "lr", lambda v: f"{v:.2e}"),
    ("tokens_per_s", "tokens/s", lambda v: f"{v:,.0f}"),
    ("mfu", "MFU", lambda v: f"{v:.1%}"),
    ("memory_gib", "GiB", lambda v: f"{v:.2f}"),
    ("world_size", "ranks", str),
    ("redo_steps_node_lost", "a lost node redoes", str),
    ("usd", "USD", lambda v: f"{v:.2f}"),
)


def build(config: RunConfig, run_dir: RunDir) -> "ConsoleSink":  # noqa: ARG001 - the signature of all sinks
    """Return a sink that prints to stdout, with the number of steps to go to."""
    return ConsoleSink(total_steps=config.train.steps)


def format_row(row: Mapping[str, object], *, total_steps: int) -> str:
    """Return one row as a line; columns that the row lacks are left out."""
    parts = [f"{name} {show(row[key])}" for key, name, show in _COLUMNS if row.get(key) is not None]
    return "  ".join([f"step {row['step']}/{total_steps}", *parts])


class ConsoleSink:
    """Prints one line per row, flushed."""

    def __init__(self, *, total_steps: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = stream

    def write(self, row: Mapping[str, object]) -> None:
        """Print one row; a closed pipe is no reason to stop training."""
        try:
            print(format_row(row, total_steps=self._total_steps), file=self._stream or sys.stdout, flush=True)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return

    def close(self) -> None:
        """Do nothing: each line was flushed."""
