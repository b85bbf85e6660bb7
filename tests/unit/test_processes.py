import os
import subprocess
import sys
import time

from elastic.processes import find_running, is_exiting, list_processes


def test_a_process_is_told_from_one_that_had_its_number_before():
    started = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)]
    time.sleep(0.05)
    started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
    try:
        first, second = (find_running(process.pid) for process in started)
        assert (first.pid, first.parent) == (started[0].pid, os.getpid())
        assert first.started < second.started
        assert {process.pid for process in started} < {process.pid for process in list_processes()}
    finally:
        for process in started:
            process.communicate()


def test_a_process_runs_no_more_once_it_has_ended_even_if_nobody_has_taken_note():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert find_running(ended.pid) is None
    assert next(process for process in list_processes() if process.pid == ended.pid).has_ended
    ended.wait()
    assert ended.pid not in {process.pid for process in list_processes()}


def test_a_name_may_hold_what_separates_the_fields():
    name = "a) Z 1 (b"
    code = f"open('/proc/self/comm', 'w').write({name!r}); print(flush=True); input()"
    named = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        named.stdout.readline()
        process = find_running(named.pid)
        assert (process.name, process.parent) == ("a) Z 1 (b", os.getpid())
    finally:
        named.communicate()


def is_known_before_it_is_waitable():
    code = "import sys; held = bytearray(b'x') * (512 * 2**20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert not is_exiting(process.pid)
        process.kill()
        while not is_exiting(process.pid):
            pass
        is_before = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        process.wait()
        assert is_exiting(process.pid), "nobody has this number"
    return is_before


def test_a_process_that_the_kernel_takes_down_is_known_before_its_parent_hears_of_its_end():
    assert any(is_known_before_it_is_waitable() for _ in range(5)), "a busy machine may come too late now and then"
