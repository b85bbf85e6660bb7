"""The processes of this machine, as /proc tells them: who descends from whom."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def find_family(pids: Iterable[int]) -> list[int]:
    """Return these processes and all their living descendants, parents first."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for proc in _PROC.glob("[0-9]*"):
        parent = _get_parent(int(proc.name))
        if parent is not None:
            children[parent].append(int(proc.name))
    found: list[int] = []
    queue = [pid for pid in pids if _get_parent(pid) is not None]
    while queue:
        pid = queue.pop(0)
        found.append(pid)
        queue += children[pid]
    return found


def is_of(pid: int, command: str) -> bool:
    """Tell whether a process lives and has `command` in its command line: numbers are given out again."""
    try:
        return command.encode() in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def _get_parent(pid: int) -> int | None:
    """Return the parent's id; None if the process has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[1])
