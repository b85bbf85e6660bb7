"""The processor time of what trains and what decides, beside Ray's other processes.

Ray starts its workers at niceness 15 (RAY_worker_niceness), and what they start inherits it: a trainer would give way
to every daemon of its machine. And Ray replaces all workers of a group after a loss: they import for seconds, while the
trainers train on.

The kernel compares niceness within a container or slice; on a machine that has neither, within a session, and then
sessions by their own (sched_autogroup_enabled, see sched(7)).
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

AHEAD = 5
"""Levels of niceness; each is worth a quarter more time, so this is three times the share."""
AHEAD_VARIABLE = "SOLVENT_TRAINERS_AHEAD"
"""Another number of levels, in the environment of the raylet: where several nodes share a machine, trainers that go
ahead of Ray's daemons keep the next node from joining."""
_AUTOGROUP = Path("/proc/self/autogroup")


def get_ahead(env: Mapping[str, str]) -> int:
    """Return how many levels trainers go ahead of their raylet."""
    said = env.get(AHEAD_VARIABLE, "")
    return int(said) if said.isdecimal() else AHEAD


def take_priority_of(pid: int, *, ahead: int = 0) -> bool:
    """Run all threads of this process, and those to come, at the niceness of another process.

    Args:
        ahead: run at so many levels less, this whole session with it.

    Returns:
        Whether this process may: becoming less nice takes root, CAP_SYS_NICE or RLIMIT_NICE. If not, nothing changes.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, pid) - ahead
    try:
        for thread in map(int, os.listdir("/proc/self/task")):  # noqa: PTH208
            with suppress(ProcessLookupError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, thread, niceness)  # of one thread only, on Linux
    except PermissionError:
        return False
    if ahead:
        with suppress(OSError):  # a kernel without it, or one that takes such a change every 100 ms only
            _AUTOGROUP.write_text(str(-ahead))
    return True
