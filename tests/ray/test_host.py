"""A host with agents and trainers: claims, leases, ends; a process of its own, without Ray."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from cluster.controller import Holder
from cluster.runtime.messages import (
    Beat,
    Bye,
    ClaimGranted,
    Exited,
    Fenced,
    ReplicaServerMoved,
)
from cluster.types import Claimed, Expired, Kill, Leave, TrainerEnded
from tests.plain_trainers import at
from tests.ray._hosts import LEASE_S, run_host
from tests.ray._traces import (
    find_replica_servers,
    get_parent,
    is_alive,
    wait_until,
)


@pytest.fixture(scope="module")
def shared_host():
    with run_host() as host:
        yield host


@pytest.fixture
def host():
    with run_host() as host:
        host.agent = host.claim(1)
        host.agent.expect(ClaimGranted)
        yield host


def test_a_claim_of_an_older_group_is_refused_and_a_newer_one_fences_the_holder(shared_host):
    holder = shared_host.claim(5, "fence")
    assert holder.expect(ClaimGranted).trainer_pid is None
    assert shared_host.coordinator.expect(Claimed, slot="fence").group == 5
    trainer_pid = shared_host.join(1, "fence")

    assert shared_host.claim(4, "fence").expect(Fenced) == Fenced(by=5)

    newer = shared_host.claim(6, "fence")
    assert newer.expect(ClaimGranted).trainer_pid == trainer_pid
    assert holder.expect(Fenced) == Fenced(by=6)
    assert shared_host.coordinator.expect(Claimed, slot="fence").group == 6
    assert is_alive(trainer_pid)


def test_an_agent_without_gpus_gets_a_slot_that_its_group_does_not_hold(shared_host):
    slots = [shared_host.claim(9, "").expect(ClaimGranted).slot for _ in range(2)]
    assert len(set(slots)) == 2


def test_the_end_of_a_trainer_is_told_to_its_agent_within_100_ms(shared_host):
    agent = shared_host.claim(1, "crash")
    agent.expect(ClaimGranted)
    times_s = []
    for attempt in range(1, 6):
        pid = shared_host.join(attempt, "crash")
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        told = agent.expect(Exited)
        times_s.append(time.monotonic() - killed_s)
        assert (told.pid, told.code, told.attempt) == (pid, -9, attempt)
        ended = shared_host.coordinator.expect(TrainerEnded, slot="crash", attempt=attempt)
        assert (ended.outcome, ended.reason) == ("crashed", "trainer ended with signal 9 (SIGKILL)")
    # others may be at work on this machine: one of five may be late
    assert sorted(times_s)[3] < 0.1, times_s


def test_a_trainer_is_ready_within_a_second_and_is_killed_only_under_its_own_attempt(shared_host):
    shared_host.claim(1, "kill").expect(ClaimGranted)
    start_s = time.monotonic()
    pid = shared_host.join(2, "kill")
    assert time.monotonic() - start_s < 1.0
    assert get_parent(pid) == shared_host.hello.pid
    shared_host.coordinator.link.send(Kill(slot=at("kill"), attempt=1))  # an order that comes too late
    time.sleep(0.1)
    assert is_alive(pid)
    shared_host.coordinator.link.send(Kill(slot=at("kill"), attempt=2))
    assert shared_host.coordinator.expect(TrainerEnded, slot="kill").outcome == "killed"


def test_a_configuration_that_the_trainer_refuses_ends_it_as_failed_with_the_reason(shared_host):
    shared_host.claim(1, "refuse").expect(ClaimGranted)
    shared_host.join(1, "refuse")
    shared_host.go(1, "refuse")
    ended = shared_host.coordinator.expect(TrainerEnded, slot="refuse")
    assert ended.outcome == "failed"
    assert ended.exit_code == 2
    assert "data.path" in ended.reason


def test_a_trainer_that_is_asked_to_leave_waits_for_the_next_world(shared_host):
    shared_host.claim(1, "leave").expect(ClaimGranted)
    shared_host.coordinator.expect(Claimed, slot="leave")  # once it is warm
    pid = shared_host.join(1, "leave")
    shared_host.coordinator.link.send(Leave(slot=at("leave"), attempt=1))
    assert shared_host.coordinator.expect(TrainerEnded, slot="leave", attempt=1).outcome == "lost"
    shared_host.coordinator.link.send(Kill(slot=at("leave"), attempt=1))  # an order that comes too late
    assert shared_host.join(2, "leave") == pid


def test_a_replica_server_that_dies_is_replaced_and_its_trainers_stay(host):
    pid = host.join(1)
    host.coordinator.link.send(Leave(slot=at("cpu0"), attempt=1))
    host.coordinator.expect(TrainerEnded, slot="cpu0", attempt=1)
    (replica_server,) = find_replica_servers(host.folder)
    os.kill(replica_server, signal.SIGKILL)
    wait_until(
        lambda: not is_alive(replica_server), timeout_s=5, what="the replica server ends"
    )  # its memory is gone before it is
    assert host.join(2) == pid
    assert host.coordinator.expect(ReplicaServerMoved).address is None
    moved = host.coordinator.expect(ReplicaServerMoved)
    assert moved.address == host.hello.replica_server, "the trainers of other nodes would look for it in vain"
    assert replica_server not in find_replica_servers(host.folder)


def test_without_an_agent_and_a_word_of_its_coordinator_the_trainer_ends_after_the_lease_and_then_the_host(host):
    pid = host.join()
    host.agent.link.close()
    start_s = time.monotonic()
    assert host.coordinator.expect(Expired, timeout_s=2 * LEASE_S).slot.name == "cpu0"
    assert LEASE_S <= time.monotonic() - start_s < LEASE_S + 1
    wait_until(lambda: not is_alive(pid), timeout_s=1, what="the trainer ends")
    host.coordinator.expect_end(timeout_s=1.0)


def test_a_trainer_without_an_agent_stays_for_as_long_as_its_coordinator_renews_its_lease(host):
    pid = host.join()
    other = host.claim(1, "cpu1")
    other.expect(ClaimGranted)
    held = Holder(group=1, group_size=1)
    host.coordinator.expect(Beat, holders={"cpu0": held, "cpu1": held})
    for agent in (host.agent, other):
        agent.link.close()
    host.coordinator.expect(Beat, holders={"cpu0": None, "cpu1": None})
    host.renew("cpu0", for_s=2 * LEASE_S)
    host.coordinator.expect(Expired, slot="cpu1")
    assert host.claim(2).expect(ClaimGranted).trainer_pid == pid
    assert is_alive(pid)


def test_a_host_without_slots_stays_for_as_long_as_its_coordinator_renews_its_lease():
    with run_host() as host:
        host.renew(for_s=2 * LEASE_S)
        assert is_alive(host.hello.pid)
        host.coordinator.expect_end(timeout_s=LEASE_S + 1)


def test_a_host_that_was_frozen_does_not_take_that_for_the_silence_of_its_coordinator():
    lease_s = 3 * LEASE_S
    with run_host(lease_s) as host:
        agent = host.claim(1)
        agent.expect(ClaimGranted)
        pid = host.join()
        agent.link.close()
        host.coordinator.expect(Beat, holders={"cpu0": None})
        os.kill(host.hello.pid, signal.SIGSTOP)
        time.sleep(lease_s)
        os.kill(host.hello.pid, signal.SIGCONT)
        host.coordinator.expect(Beat)
        assert host.claim(2).expect(ClaimGranted).trainer_pid == pid


def test_a_new_agent_within_the_lease_finds_its_trainer_at_work(host):
    pid = host.join()
    host.agent.link.close()
    time.sleep(LEASE_S / 2)
    agent = host.claim(2)
    assert agent.expect(ClaimGranted).trainer_pid == pid
    time.sleep(LEASE_S)
    assert is_alive(pid)


def test_a_host_and_its_trainers_end_with_their_raylet(host):
    pid = host.join()
    host.raylet.kill()
    start_s = time.monotonic()
    assert host.agent.expect(Bye, timeout_s=5).reason == "its raylet ended"
    wait_until(lambda: not is_alive(pid), timeout_s=1, what="the trainer ends")
    assert time.monotonic() - start_s < 1


def test_a_host_and_its_trainers_end_if_nobody_takes_the_place_of_their_coordinator_in_half_a_lease(host):
    pid = host.join()
    host.listener.close()
    host.coordinator.link.close()
    start_s = time.monotonic()
    assert host.agent.expect(Bye, timeout_s=LEASE_S / 2 + 5).reason == "its coordinator ended"
    assert time.monotonic() - start_s >= LEASE_S / 2
    wait_until(lambda: not is_alive(pid), timeout_s=1, what="the trainer ends")


def test_trainers_die_with_a_host_that_is_killed(host):
    pid = host.join()
    os.kill(host.hello.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), timeout_s=1, what="the trainer ends")
    shutil.rmtree(host.folder / "host")  # what a killed host cannot take away


@pytest.mark.parametrize("word", [b"GET / HTTP/1.0\r\n\r\n", b'\0\0\0\x0f{"kind":"Join"}'])
def test_what_no_agent_says_ends_its_own_connection_and_neither_host_nor_trainer(host, word):
    pid = host.join()
    stranger = host.connect()
    stranger.link._socket.sendall(word)
    stranger.expect_end(timeout_s=5)
    host.coordinator.messages.clear()
    host.coordinator.expect(Beat)
    assert is_alive(pid)
    assert host.claim(1, "cpu7").expect(ClaimGranted)


def test_a_host_out_of_descriptors_serves_whom_it_knows_and_lets_others_in_once_it_has_some(host):
    pid = host.join()
    used = len(list(Path(f"/proc/{host.hello.pid}/fd").iterdir()))
    soft, hard = resource.prlimit(host.hello.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(host.hello.pid, resource.RLIMIT_NOFILE, (used, hard))
    agent = host.claim(1, "cpu7")
    host.coordinator.messages.clear()
    for _ in range(3):
        host.coordinator.expect(Beat)
    assert "nobody can connect for now" in host.log.read_text()
    assert not agent.messages
    resource.prlimit(host.hello.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert agent.expect(ClaimGranted)
    assert is_alive(pid)
