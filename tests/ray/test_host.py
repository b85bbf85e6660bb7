"""The host alone: a real daemon with real trainers, a raylet that only sleeps and a coordinator that the test plays."""

import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.controller import Holder
from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import (
    FROM_HOST,
    Abandoned,
    Beat,
    Bye,
    Claim,
    ClaimGranted,
    CoordinatorMoved,
    Exited,
    Fenced,
    HostHello,
    Ready,
    Renew,
    ReplicaServerMoved,
    TrainerSaid,
    Welcome,
)
from cluster.runtime.node.connect import connect, tell_address
from cluster.runtime.node.start_host import launch_host
from cluster.types import Claimed, Expired, Go, Join, Kill, Leave, TrainerEnded
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.transport import Acceptor, Link
from tests.plain_trainers import NODE, at, is_said
from tests.ray._traces import (
    assert_nothing_left,
    find_hosts,
    find_replica_servers,
    find_trainers,
    get_parent,
    is_alive,
    wait_until,
)

LEASE_S = 2.0
SECRET = "s3cret"


class Peer:
    """The test's end of a link: waits for messages of a kind, keeps the others."""

    def __init__(self, link):
        self.link = link
        self.messages = []
        self.is_gone = False

    def expect(self, kind, *, timeout_s=20.0, **fields):
        """Return the first message of a kind with these fields."""
        wanted = f"{kind.__name__} with {fields}"
        deadline_s = time.monotonic() + timeout_s
        while True:
            for message in self.messages:
                if is_said(message, kind, fields):
                    self.messages.remove(message)
                    return message
            assert not self.is_gone, f"it left without {wanted}; it said {self.messages}"
            assert time.monotonic() < deadline_s, f"no {wanted}; it said {self.messages}"
            self.read(0.1)

    def read(self, timeout_s):
        new = self.link.receive(timeout_s)
        self.is_gone = new is None
        self.messages += new or []

    def expect_end(self, *, timeout_s):
        deadline_s = time.monotonic() + timeout_s
        while not self.is_gone:
            assert time.monotonic() < deadline_s, "it is still there"
            self.read(0.1)


class HostUnderTest:
    """A started host with all that it depends on."""

    def __init__(self, folder, lease_s, config):
        self.folder = folder
        self.config = RunConfig(storage=str(folder / "host" / "runs"), **config)
        self.raylet = subprocess.Popen(["sleep", "600"], env={"TMPDIR": str(folder)})
        self.log = folder / "host" / "host.log"
        self.spec = {
            "node": NODE,
            "node_ip": "127.0.0.1",
            "folder": str(folder / "host"),
            "coordinator_address": asdict(self.sit_down(generation=1)),
            "raylet_pid": self.raylet.pid,
            "secret": SECRET,
            "lease_s": lease_s,
            "config": asdict(self.config),
        }
        self.coordinator = None
        self.agents = []

    def start(self, **changes):
        launch_host({**self.spec, **changes}, {**os.environ, "TMPDIR": str(self.folder)})

    def sit_down(self, generation):
        """Be the coordinator from now on; return where."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.listener = Acceptor(listener, say=print, secret=SECRET, purpose="coordinator")
        return CoordinatorAddress(generation=generation, host="127.0.0.1", port=listener.getsockname()[1])

    def take_address(self, generation):
        """Be the coordinator from now on, of which the host is told."""
        assert tell_address(self.folder / "host", self.sit_down(generation))

    def meet(self):
        """Let the host come, and take it; return what it says first."""
        hello = self.listen()
        self.coordinator.link.send(Welcome())
        return hello

    def listen(self):
        """Let the host come, but do not answer; return what it says."""
        deadline_s = time.monotonic() + 60
        while not (peers := self.listener.turn(0.1)):
            assert time.monotonic() < deadline_s, "no host came"
        self.coordinator = Peer(Link(peers[0], FROM_HOST, sends="waiting"))
        return self.coordinator.expect(HostHello)

    def leave_address(self):
        """End as the coordinator; return once the host has noticed."""
        self.listener.close()
        self.coordinator.link.close()
        wait_until(lambda: "the coordinator is gone" in self.log.read_text(), timeout_s=20, what="it is noticed")

    def connect(self):
        """Return a new connection of an agent."""
        agent = Peer(connect(self.folder / "host"))
        self.agents.append(agent)
        return agent

    def claim(self, group, slot="cpu0"):
        """Come as an agent; return its end of the link."""
        agent = self.connect()
        agent.link.send(Claim(group=group, group_size=1, pid=1, slot=slot, env={"CUDA_VISIBLE_DEVICES": ""}))
        return agent

    def renew(self, *slots, for_s):
        """Renew the leases of these slots, as a coordinator does that expects agents for them."""
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            self.coordinator.link.send(Renew(slots=slots))
            time.sleep(LEASE_S / 4)

    def join(self, attempt=1, slot="cpu0"):
        """Have a slot's trainer join a world; return its process id once it waits for its place."""
        self.coordinator.link.send(Join(slot=at(slot), attempt=attempt))
        said = self.coordinator.expect(TrainerSaid, slot=slot, attempt=attempt).message
        assert isinstance(said, Ready)
        return said.pid

    def go(self, attempt, slot):
        """Let a trainer that waits for its place train alone."""
        place = dict.fromkeys(("rank", "local_rank"), 0) | dict.fromkeys(("world_size", "local_world_size"), 1)
        store = {"store_host": "127.0.0.1", "store_port": 0}
        self.coordinator.link.send(Go(slot=at(slot), attempt=attempt, **place, **store))

    def close(self):
        self.raylet.kill()
        self.raylet.wait()
        self.listener.close()
        for peer in filter(None, (self.coordinator, *self.agents)):
            peer.link.close()


@contextmanager
def prepare_host(lease_s=LEASE_S, **config) -> Iterator[HostUnderTest]:
    """All but the host itself."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    host = HostUnderTest(folder, lease_s, config)
    try:
        yield host
    finally:
        host.close()
        assert_nothing_left(folder, timeout_s=5)
        shutil.rmtree(folder)


@contextmanager
def run_host(lease_s=LEASE_S, **config) -> Iterator[HostUnderTest]:
    with prepare_host(lease_s, **config) as host:
        host.start()
        host.hello = host.meet()
        yield host


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


@pytest.fixture
def patient_host():
    """One that waits a minute for another coordinator; its trainer is in the world of attempt 7."""
    with run_host(lease_s=120.0) as host:
        host.agent = host.claim(3)
        host.agent.expect(ClaimGranted)
        host.coordinator.expect(Claimed, slot="cpu0", group=3)
        host.pid = host.join(7)
        yield host


def test_a_host_is_a_session_of_its_own_with_one_thread(shared_host):
    pid = shared_host.hello.pid
    assert shared_host.hello.node == shared_host.spec["node"]
    assert os.getsid(pid) not in (os.getsid(0), 0)
    assert get_parent(pid) not in (os.getpid(), shared_host.raylet.pid)
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_a_second_start_leaves_the_host_that_is_there_alone(shared_host):
    shared_host.start()
    wait_until(lambda: find_hosts(shared_host.folder) == [shared_host.hello.pid], timeout_s=5, what="one host")
    assert not shared_host.coordinator.is_gone


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


def test_trainers_die_with_a_host_that_is_killed(host):
    pid = host.join()
    os.kill(host.hello.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), timeout_s=1, what="the trainer ends")
    shutil.rmtree(host.folder / "host")  # what a killed host cannot take away


def test_of_two_that_start_at_once_one_is_the_host_and_reports_to_the_newer_coordinator():
    with prepare_host() as host:
        host.listener.close()
        newer = asdict(host.sit_down(generation=2))
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(host.start, **changes) for changes in ({}, {"coordinator_address": newer})]
            [start.result() for start in starts]
        pid = host.meet().pid
        wait_until(lambda: find_hosts(host.folder) == [pid], timeout_s=5, what="one host")


def test_a_host_that_fails_says_how_before_it_and_its_trainers_end():
    with prepare_host() as host:
        del host.spec["config"]["fault"]["silent_s"]  # asked for once there is a trainer
        host.start()
        host.meet()
        reason = host.claim(1).expect(Bye).reason
        assert reason.startswith("it failed\nTraceback")
        assert "KeyError: 'silent_s'" in reason
        wait_until(lambda: not find_trainers(host.folder), timeout_s=1, what="the trainer ends")


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


def test_a_host_that_comes_when_its_run_has_ended_waits_for_nobody():
    with prepare_host(lease_s=120.0) as host:
        host.listener.close()
        host.start()
        reason = host.claim(1).expect(Bye).reason
        assert reason == f"no coordinator answers at 127.0.0.1:{host.spec['coordinator_address']['port']}"
        wait_until(lambda: not find_hosts(host.folder), timeout_s=10, what="it ends")
        assert not (host.folder / "host").exists()


def test_a_host_that_cannot_start_says_why_and_leaves_nothing():
    with prepare_host() as host:
        host.raylet.kill()
        host.raylet.wait()
        with pytest.raises(SolventError, match=r"(?s)no host could start in .*No such process"):
            host.start()


@pytest.mark.parametrize("after_s", [0.01, 0.04, 0.08, 0.16])
def test_who_starts_a_host_and_is_killed_meanwhile_leaves_a_host_or_nothing(after_s):
    with prepare_host() as host:
        starter = multiprocessing.get_context("fork").Process(target=host.start)
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
