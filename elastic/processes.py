"""The processes of this machine, as Linux tells them in /proc/<pid>/stat: proc(5)."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")

_PF_EXITING = 0x4
_NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process as it was when it was looked at."""

    pid: int
    name: str
    """The first 15 bytes of its program's name, or what it has named itself since."""
    parent: int
    started: int
    """Clock ticks after boot: with it, a number that was given out again is not mistaken."""
    has_ended: bool
    """Its parent has not taken note yet."""
    is_exiting: bool
    """The kernel takes it down, or has done so."""


def find_running(pid: int) -> Process | None:
    """Return a process; None once it has ended."""
    process = _read(pid)
    return None if process is None or process.has_ended else process


def describe_state(pid: int) -> str:
    """Return what a process does in the kernel, for people: of its threads, the first that has not ended."""
    for task in sorted((_PROC / str(pid) / "task").glob("*")):
        try:
            state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            where = (task / "wchan").read_text(errors="replace").strip("0\n")
        except OSError:  # it has just ended
            continue
        if state not in "ZX":
            return f"state {state}{f' in {where}' if where else ''}"
    return "no thread left"


def is_exiting(pid: int) -> bool:
    """Tell whether the kernel is taking a process down, or has done so.

    With tens of GiB and a GPU's context that takes most of a second, and only then does its parent hear of it. Source:
    proc_pid_stat(5), field 9; include/linux/sched.h (PF_EXITING).
    """
    process = _read(pid)
    return process is None or process.is_exiting


def list_processes() -> Iterator[Process]:
    """Yield all processes, those that have just ended too."""
    for folder in _PROC.glob("[0-9]*"):
        if process := _read(int(folder.name)):
            yield process


def _read(pid: int) -> Process | None:
    try:
        before, _, after = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")
    except OSError:  # nobody has this number
        return None
    fields = after.split()  # from the third on; the name before may hold anything
    return Process(
        pid=pid,
        name=before.partition("(")[2],
        parent=int(fields[1]),
        started=int(fields[19]),
        has_ended=fields[0] in "ZX",
        is_exiting=bool(int(fields[6]) & _PF_EXITING),
    )


def be_nice() -> None:
    """Let training go first on a machine without a core to spare; for the calling thread alone."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
