"""Taking another process' niceness, in processes of their own: nobody may undo what he did to himself."""

import os
import subprocess
import sys

import pytest

TAKE = """
import os, sys, threading
from cluster.runtime.priority import take_priority_of
os.nice(5)
wait = threading.Event()
threading.Thread(target=wait.wait, daemon=True).start()
if sys.argv[2] == "nobody":
    os.setuid(65534)
may = take_priority_of(int(sys.argv[1]))
threading.Thread(target=wait.wait, daemon=True).start()
print(may, *[os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")])
"""


@pytest.fixture
def niceness():
    return os.getpriority(os.PRIO_PROCESS, os.getpid())


def take(user: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", TAKE, str(os.getpid()), user], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be less nice than it was")
def test_all_threads_and_those_to_come_take_the_niceness_of_another_process(niceness):
    assert take("root") == f"True {niceness} {niceness} {niceness}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_is_told_and_stays_as_nice_as_he_was(niceness):
    assert take("nobody") == f"False {niceness + 5} {niceness + 5} {niceness + 5}"
