"""Spools on this machine: which process holds one, and what is in those that killed processes have left.

A spool is a folder that its process keeps locked for as long as it lives, whatever becomes of process ids, and that
says which generation its holder led with. Only the next leader of the same run looks into it; other runs' are left.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from elastic.records.fencing import read_generation
from elastic.storage import Storage

_NAME = "solvent-spool-"
_LOCK = ".lock"
_EPOCH = ".epoch"


@dataclass(frozen=True, kw_only=True)
class SpoolFolder:
    """A folder of this process; others see that it is in use until `release`."""

    path: Path
    lock: IO[bytes]

    def note_generation(self, storage: Storage, generation: int) -> None:
        """Write down which generation the rows in here go on from.

        Raises:
            OSError: the storage cannot be read.
        """
        note = {"epoch": generation, "record": read_generation(storage, generation).decode()}
        (self.path / _EPOCH).write_text(json.dumps(note))

    def release(self, *, remove: bool) -> None:
        """Let go of it; what is not removed, the next leader of the run on this machine looks into."""
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def create_spool(url: str) -> SpoolFolder:
    """Make a spool for the run at a URL."""
    path = Path(tempfile.mkdtemp(prefix=_get_prefix(url)))
    unlocked = path / f"{_LOCK}.new"
    lock = unlocked.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(path / _LOCK)  # one that is not locked yet has another name, so it is not taken for dead
    return SpoolFolder(path=path, lock=lock)


def take_over(storage: Storage, root: Path) -> None:
    """Bring to `root` the rows that the last leader had when it was killed, and remove all dead spools of the run.

    They are taken only if every row file of the run begins as in `root` and the storage: then nobody has written since.

    Args:
        root: with the rows that the storage has, of a process that leads the run.

    Raises:
        OSError: the storage cannot be read.
    """
    for generation, path in sorted(_find_dead(storage.url), reverse=True):  # the last leader's first
        if generation and _is_of_this_run(storage, generation, path):
            _take_rows(storage, root, path)
        shutil.rmtree(path, ignore_errors=True)


def _take_rows(storage: Storage, root: Path, dead: Path) -> None:
    left = _read_row_files(dead)
    known = _read_row_files(root)
    for name in left.keys() - known.keys():  # samples, which are not fetched
        with suppress(FileNotFoundError):
            known[name] = storage.read(name)
    if not all(left.get(name, b"").startswith(rows) for name, rows in known.items()):
        return
    for name, rows in left.items():
        if len(rows) > len(known.get(name, b"")):
            (root / name).write_bytes(rows)


def _read_row_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def _find_dead(url: str) -> Iterator[tuple[int, Path]]:
    """Yield the dead spools of the run at a URL, with the generation that each one's holder led with (0: none)."""
    for path in Path(tempfile.gettempdir()).glob(f"{_get_prefix(url)}*"):
        with suppress(OSError), (path / _LOCK).open("rb") as lock:  # gone, being made, in use, or another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield int(_read_note(path).get("epoch", 0)), path


def _is_of_this_run(storage: Storage, generation: int, path: Path) -> bool:
    """Tell whether the storage knows the generation: a run that was deleted and began anew under its name does not."""
    try:
        return read_generation(storage, generation).decode() == _read_note(path).get("record")
    except FileNotFoundError:
        return False


def _read_note(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / _EPOCH).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _get_prefix(url: str) -> str:
    user = os.getuid()
    return f"{_NAME}{user}-{hashlib.sha256(url.encode()).hexdigest()[:12]}-"
