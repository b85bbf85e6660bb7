"""The processor time of what trains and what decides, beside Ray's other workers.

Ray starts its workers at niceness 15 (RAY_worker_niceness), and what they start inherits it: a trainer would give way
to every daemon of its machine, and share what is left with the workers that Ray starts anew after a loss.
"""

import os
from contextlib import suppress


def take_priority_of(pid: int) -> bool:
    """Run all threads of this process, and those to come, at the niceness of another process.

    Returns:
        Whether this process may: becoming less nice takes root, CAP_SYS_NICE or RLIMIT_NICE.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, pid)
    try:
        for thread in map(int, os.listdir("/proc/self/task")):  # noqa: PTH208
            with suppress(ProcessLookupError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, thread, niceness)  # of one thread only, on Linux
    except PermissionError:
        return False
    return True
