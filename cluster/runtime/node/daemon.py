"""How a process leaves its starter behind and becomes the only one of its kind in a folder. No torch here."""

import contextlib
import fcntl
import os
import sys
import time
import traceback
from pathlib import Path

READY = "ready"
"""The last line that the starter of a daemon reads from it, if all went well."""


def detach() -> None:
    """Leave the starting process, its session and its group behind.

    A double fork and a session of its own are what Ray 2.60 spares when a worker ends. Nothing may be left on disk
    before: until then Ray may end this process at any moment.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def take_folder(folder: Path) -> bool:
    """Make a folder (mode 0700) unless it is there, and lock it for the life of this process; False if another has it.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the one that had it may have removed the folder between our two calls: then the lock that counts is a new file
        if os.path.samestat(os.fstat(lock), (folder / "lock").stat()):
            return True
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return False


def write_to(log: Path) -> None:
    """Append what this process says, standard output and error, to a log from now on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def log(text: str) -> None:
    """Add a line to the daemon's own log, which `write_to` has made of its output; a full disk ends no daemon."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


class Starter:
    """A daemon's last tie to the process that started it: a pipe on which that one waits for good or bad news."""

    def __init__(self) -> None:
        """Take over standard output, from which the starter reads."""
        self._pipe: int | None = os.dup(1)

    def tell_ready(self) -> None:
        """Let the starter go on."""
        self._tell(READY)

    def tell_failure(self) -> None:
        """Let the starter know which exception is being handled, unless it has gone on."""
        self._tell(traceback.format_exc())

    def _tell(self, text: str) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        sys.stdout.flush()
        with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile
            os.write(pipe, f"{text}\n".encode())
        os.close(pipe)
