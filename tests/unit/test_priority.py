"""Taking another process' niceness, in processes of their own: nobody may undo what he did to himself."""

import os
import subprocess
import sys

import pytest

from cluster.runtime.node.priority import AHEAD, AHEAD_VARIABLE, get_ahead

TAKE = """
import os, sys, threading
from cluster.runtime.node.priority import take_priority_of
os.nice(5)
wait = threading.Event()
threading.Thread(target=wait.wait, daemon=True).start()
if sys.argv[2] == "nobody":
    os.setuid(65534)
may = take_priority_of(int(sys.argv[1]), ahead=int(sys.argv[3]))
threading.Thread(target=wait.wait, daemon=True).start()
print(may, *[os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")])
autogroup = "/proc/self/autogroup"  # "/autogroup-12 nice 0"
print(open(autogroup).read().split()[-1] if os.path.exists(autogroup) else -int(sys.argv[3]))
"""


@pytest.fixture
def niceness():
    return os.getpriority(os.PRIO_PROCESS, os.getpid())


def take(user: str, *, ahead: int) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", TAKE, str(os.getpid()), user, str(ahead)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ).stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be less nice than it was")
@pytest.mark.parametrize("ahead", [0, 3])
def test_all_threads_and_those_to_come_take_the_niceness_of_another_process_and_the_session_goes_ahead(niceness, ahead):
    assert take("root", ahead=ahead) == [f"True{f' {niceness - ahead}' * 3}", str(-ahead)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("ahead", [0, 3])
def test_who_may_not_is_told_and_stays_as_nice_as_he_was(niceness, ahead):
    assert take("nobody", ahead=ahead)[0] == f"False{f' {niceness + 5}' * 3}"


@pytest.mark.parametrize(("said", "ahead"), [("", AHEAD), ("0", 0), ("3", 3), ("-1", AHEAD), ("x", AHEAD)])
def test_trainers_go_as_far_ahead_as_the_node_s_environment_says(said, ahead):
    assert get_ahead({AHEAD_VARIABLE: said} if said else {}) == ahead
