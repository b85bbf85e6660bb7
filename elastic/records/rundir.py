"""The files of one run's directory, and how a line reaches one of them.

`metrics.jsonl` and its sisters are the truth about a run: one writer each, whole lines only, flushed as written.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elastic.errors import StorageError
from elastic.storage import is_url
from elastic.strict_json import dump_json, load_json

BASE = "base"
"""The folder of a run with the frozen weights that its adapters stand beside."""
ORIGIN = "hf"
"""The folder of a run with what came with an imported model beside its weights."""
_WRITTEN = frozenset({"run", "storage", "data.path", "model.dim", "fault.lease_s"})
"""Some of the keys that a run's own configuration has, since it has all; one that people write seldom has these."""


DATA = "data"
"""The folder of a run with the tokenizer and the description of the data that it was trained on."""


@dataclass(frozen=True)
class RunDir:
    """Paths below `<storage>/<run>/` (CONTRACT: others read these names)."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One row per optimizer step; after a rewind the last row of a step wins."""
        return self.root / "metrics.jsonl"

    @property
    def attempts(self) -> Path:
        """One row per world."""
        return self.root / "attempts.jsonl"

    @property
    def ledger(self) -> Path:
        """One row per stretch of a node's paid time."""
        return self.root / "ledger.jsonl"

    @property
    def incidents(self) -> Path:
        """One row per node or trainer that went away."""
        return self.root / "incidents.jsonl"

    @property
    def bad_steps(self) -> Path:
        """One row per step that was not applied, with the samples that no update has seen."""
        return self.root / "bad_steps.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def origin(self) -> Path:
        """`config.json` of the model that the run began with; only if it was imported."""
        return self.root / ORIGIN / "config.json"

    @property
    def report(self) -> Path:
        """The page that `solvent report` makes."""
        return self.root / "report.html"

    def profile(self, *, attempt: int, rank: int) -> Path:
        """Return where a rank writes the trace of the steps that `profile_at_step` asks for."""
        return self.root / f"profile-{attempt}-{rank}.json.gz"

    def samples(self, *, attempt: int, rank: int) -> Path:
        """Return where a rank writes the sample ids it consumed in an attempt."""
        return self.root / f"samples-{attempt}-{rank}.jsonl"


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """The run that a `config.yaml` was written for, as it lies beside it."""

    directory: Path
    created_in: Path | None
    """What the file's relative paths are relative to; None: nobody can say."""
    moved_from: str
    """Where the file says that the run is, if that is not `directory`."""


def find_own_run(path: Path, settings: Mapping[str, object]) -> OwnRun | None:
    """Return the run of a run's own `config.yaml`; None for any other configuration file.

    Args:
        settings: what the file says, by key.
    """
    directory = Path(os.path.abspath(path)).parent  # noqa: PTH100 (pathlib leaves ".." in, or follows links)
    run_dir = RunDir(directory)
    is_own = path.name == run_dir.config.name and settings.keys() >= _WRITTEN
    if not is_own or not (run_dir.metrics.exists() or any(run_dir.checkpoints.glob("step-*"))):
        return None
    if is_url(str(settings["storage"])):
        return None
    said = Path(str(settings["storage"])) / str(settings["run"])
    if said.is_absolute():
        is_here, created_in = said.exists() and said.samefile(directory), None
    else:
        is_here = directory.parts[-len(said.parts) :] == said.parts
        created_in = Path(*directory.parts[: -len(said.parts)]) if is_here else None
    return OwnRun(directory=directory, created_in=created_in, moved_from="" if is_here else str(said))


def format_utc(time_s: float) -> str:
    """Return a Unix time as ISO 8601 in UTC with milliseconds, such as ``2026-11-24T01:02:03.004Z``."""
    moment = datetime.fromtimestamp(round(time_s * 1000) / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def parse_utc(text: str) -> float:
    """Return the Unix time of what `format_utc` wrote."""
    return datetime.fromisoformat(text).timestamp()


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one line of strict JSON with one write, so that no reader sees half of a line that was written whole.

    Raises:
        StorageError: the storage is full, read-only or gone; a torn line may be left.
    """
    line = (dump_json(row) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) < len(line):  # what the last free page could hold
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise StorageError(
            f"storage: {path} cannot be written ({error.strerror}), and a run that leaves no trace cannot be explained "
            "or resumed exactly. Free or unlock the storage, then start the same command again: it resumes."
        ) from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a JSONL file; a last line cut short by a crash is left out, a missing file is empty.

    What is not finite is None, as null and as the bare words that earlier versions wrote.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                yield load_json(line)
            except ValueError:  # a torn line that a later attempt wrote on
                continue


def end_torn_line(path: Path) -> None:
    """End a last line that a crash cut short, so that the next row starts on a line of its own.

    A writer calls this once when it opens a file that an earlier process may have left.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
