"""A host whose coordinator goes, and comes back or is followed by another."""

import os
import signal
from contextlib import closing

import pytest

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import (
    Abandoned,
    Beat,
    Bye,
    ClaimGranted,
    CoordinatorMoved,
)
from cluster.types import Claimed, TrainerEnded
from tests.ray._hosts import run_host
from tests.ray._traces import (
    is_alive,
    wait_until,
)


@pytest.fixture
def patient_host():
    """One that waits a minute for another coordinator; its trainer is in the world of attempt 7."""
    with run_host(lease_s=120.0) as host:
        host.agent = host.claim(3)
        host.agent.expect(ClaimGranted)
        host.coordinator.expect(Claimed, slot="cpu0", group=3)
        host.pid = host.join(7)
        yield host


def test_a_host_that_is_abandoned_ends_at_once_but_not_under_its_coordinator(patient_host):
    host = patient_host
    stranger = host.connect()
    stranger.link.send(Abandoned())
    host.coordinator.messages.clear()
    for _ in range(3):
        host.coordinator.expect(Beat)
    assert is_alive(host.pid)

    host.leave_address()
    stranger.link.send(Abandoned())
    reason = "its coordinator ended, and the run has other hosts by now"
    assert host.agent.expect(Bye, timeout_s=20).reason == reason
    wait_until(lambda: not is_alive(host.pid), timeout_s=1, what="the trainer ends")


def test_the_next_coordinator_is_told_who_is_there_once_the_trainers_have_left_the_world_before(patient_host):
    host = patient_host
    host.leave_address()
    assert is_alive(host.pid)

    host.take_address(generation=8)
    assert host.meet() == host.hello  # its process, its replica server and so the snapshots in it are the same

    claimed = host.coordinator.expect(Claimed, slot="cpu0", group=3)
    assert (claimed.group_size, claimed.agent_pid) == (1, 1)
    # said before the claim, or it would not have been there to be found
    assert [m.outcome for m in host.coordinator.messages if isinstance(m, TrainerEnded)] == ["lost"]
    assert host.join(8) == host.pid


def test_trainers_stay_in_their_world_until_the_next_coordinator_has_answered(patient_host):
    host = patient_host
    host.coordinator.link.close()
    assert host.listen() == host.hello  # as where the kernel still takes connections for a process that it ends
    for _ in range(5):
        host.coordinator.read(0.2)
    assert host.coordinator.messages == []

    with (
        closing(host.listener),
        host.coordinator.link._socket,
    ):  # it need not wait for the end of the one that does not answer
        host.take_address(generation=8)
        host.meet()
    # said now, or it would not be heard: nobody is told of what happens before an answer
    assert host.coordinator.expect(TrainerEnded, slot="cpu0", attempt=7).outcome == "lost"
    host.coordinator.expect(Claimed, slot="cpu0", group=3)
    assert host.join(8) == host.pid


def test_late_news_of_an_older_coordinator_is_no_news(patient_host):
    host = patient_host
    host.leave_address()
    newer, older = host.sit_down(generation=8), CoordinatorAddress(generation=2, host="127.0.0.1", port=9)
    starter = host.connect()
    os.kill(host.hello.pid, signal.SIGSTOP)  # it will hear both at once
    for address in (newer, older):
        starter.link.send(CoordinatorMoved(address=address))
    os.kill(host.hello.pid, signal.SIGCONT)
    assert host.meet() == host.hello


def test_a_trainer_that_does_not_leave_the_world_of_a_dead_coordinator_is_replaced(patient_host):
    host = patient_host
    os.kill(host.pid, signal.SIGSTOP)
    host.leave_address()
    host.take_address(generation=8)
    host.meet()
    host.coordinator.expect(Claimed, slot="cpu0", group=3)
    assert not is_alive(host.pid)
    assert host.join(8) != host.pid


def test_claims_that_nobody_could_be_told_of_are_told_to_the_next_coordinator(patient_host):
    host = patient_host
    host.claim(3, "cpu1").expect(ClaimGranted)
    host.coordinator.expect(Claimed, slot="cpu1")
    host.leave_address()
    host.claim(4, "cpu1").expect(ClaimGranted)
    host.take_address(generation=8)
    host.meet()
    assert host.coordinator.expect(Claimed, slot="cpu1").group == 4
    assert host.coordinator.expect(Claimed, slot="cpu0").group == 3
    assert not [m for m in host.coordinator.messages if isinstance(m, Claimed)]


def test_a_host_comes_back_to_a_coordinator_that_lives_when_only_the_connection_broke(patient_host):
    host = patient_host
    host.coordinator.link.close()
    assert host.meet() == host.hello
    host.coordinator.expect(Claimed, slot="cpu0", group=3)
    assert host.join(8) == host.pid
