"""How a host starts: as a Ray worker starts it, cold, alone or beside others."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.runtime.messages import (
    Bye,
)
from elastic.errors import SolventError
from tests.ray._hosts import prepare_host
from tests.ray._traces import (
    find_hosts,
    find_trainers,
    get_parent,
    wait_until,
)


@pytest.fixture(scope="module")
def launched():
    with prepare_host() as host:
        host.launch()
        host.hello = host.meet()
        yield host


def test_a_host_is_a_session_of_its_own_with_one_thread(launched):
    pid = launched.hello.pid
    assert launched.hello.node == launched.spec["node"]
    assert os.getsid(pid) not in (os.getsid(0), 0)
    assert get_parent(pid) not in (os.getpid(), launched.raylet.pid)
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_a_second_start_leaves_the_host_that_is_there_alone(launched):
    launched.launch()
    wait_until(lambda: find_hosts(launched.folder) == [launched.hello.pid], timeout_s=30, what="one host")
    assert not launched.coordinator.is_gone


def test_of_two_that_start_at_once_one_is_the_host_and_reports_to_the_newer_coordinator():
    with prepare_host() as host:
        host.listener.close()
        newer = asdict(host.sit_down(generation=2))
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(host.launch, **changes) for changes in ({}, {"coordinator_address": newer})]
            [start.result() for start in starts]
        pid = host.meet().pid
        wait_until(lambda: find_hosts(host.folder) == [pid], timeout_s=30, what="one host")


def test_a_host_that_cannot_start_says_why_and_leaves_nothing():
    with prepare_host() as host:
        host.raylet.kill()
        host.raylet.wait()
        with pytest.raises(SolventError, match=r"(?s)no host could start in .*No such process"):
            host.launch()


@pytest.mark.parametrize("after_s", [0.01, 0.04, 0.08, 0.16])
def test_who_starts_a_host_and_is_killed_meanwhile_leaves_a_host_or_nothing(after_s):
    with prepare_host() as host:
        starter = multiprocessing.get_context("fork").Process(target=host.launch)
        starter.start()
        wait_until(lambda: find_hosts(host.folder), timeout_s=30, what="it begins", every_s=0.001)
        time.sleep(after_s)
        for pid in (starter.pid, *find_hosts(host.folder)):  # as Ray does
            if get_parent(pid) in (os.getpid(), starter.pid):
                os.kill(pid, signal.SIGKILL)
        starter.join()
        wait_until(
            lambda: bool(find_hosts(host.folder)) == (host.folder / "host").exists(), timeout_s=30, what="both or none"
        )


def test_a_host_that_comes_when_its_run_has_ended_waits_for_nobody():
    with prepare_host(lease_s=120.0) as host:
        host.listener.close()
        host.start()
        reason = host.claim(1).expect(Bye).reason
        assert reason == f"no coordinator answers at 127.0.0.1:{host.spec['coordinator_address']['port']}"
        wait_until(lambda: not find_hosts(host.folder), timeout_s=10, what="it ends")
        assert not (host.folder / "host").exists()


def test_a_host_that_fails_says_how_before_it_and_its_trainers_end():
    with prepare_host() as host:
        del host.spec["config"]["fault"]["silent_s"]  # asked for once there is a trainer
        host.start()
        host.meet()
        reason = host.claim(1).expect(Bye).reason
        assert reason.startswith("it failed\nTraceback")
        assert "KeyError: 'silent_s'" in reason
        wait_until(lambda: not find_trainers(host.folder), timeout_s=1, what="the trainer ends")
