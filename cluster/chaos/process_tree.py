"""Which processes of this machine belong together."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from elastic.processes import find_running, list_processes


def find_family(pids: Iterable[int]) -> list[int]:
    """Return these processes and all their living descendants, parents first."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for process in list_processes():
        if not process.has_ended:
            children[process.parent].append(process.pid)
    found: list[int] = []
    queue = [pid for pid in pids if find_running(pid)]
    while queue:
        pid = queue.pop(0)
        found.append(pid)
        queue += children[pid]
    return found


def is_of(pid: int, command: str) -> bool:
    """Tell whether a process lives and has `command` in its command line: numbers are given out again."""
    try:
        return command.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
