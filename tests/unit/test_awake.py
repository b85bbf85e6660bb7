import os
import signal
import subprocess
import sys
import time

import pytest

from elastic import awake
from elastic.awake import AwakeClock

LOOKS = """
import time
from elastic.awake import AwakeClock
clock, start_s = AwakeClock(), time.monotonic()
print(flush=True)
while time.monotonic() - start_s < 2.5:
    time.sleep(0.01)
    clock.get_s()
print(clock.get_s())
"""


def test_counts_what_lies_between_looks_up_to_a_second_each(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(awake.time, "monotonic", lambda: now_s)
    clock = AwakeClock()
    for look_s in (0.25, 0.5, 3600.0, 0.125):
        now_s += look_s
        told_s = clock.get_s()
    assert told_s == pytest.approx(0.25 + 0.5 + 1.0 + 0.125)


@pytest.mark.parametrize(("stopped_s", "least_s", "most_s"), [(0.0, 2.4, 10.0), (2.3, 0.9, 1.5)])
def test_stands_still_while_the_process_is_stopped(stopped_s, least_s, most_s):
    with subprocess.Popen([sys.executable, "-c", LOOKS], stdout=-1, text=True) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(stopped_s)
        os.kill(process.pid, signal.SIGCONT)
        assert least_s < float(process.stdout.readline()) < most_s
