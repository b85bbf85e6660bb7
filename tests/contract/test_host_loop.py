"""A whole host in a process of its own, with a real replica server and real trainers that know nothing of torch."""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from cluster.controller import Holder
from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import (
    Beat,
    ClaimGranted,
    End,
    ReplicaServerMoved,
    ReplicaServersTold,
    TrainerSaid,
)
from cluster.runtime.node.daemon import take_folder, write_to
from cluster.runtime.node.host import Host
from cluster.runtime.node.host_spec import HostSpec
from cluster.types import Claimed, Expired, Join, Kill, Leave, TrainerEnded, Unkillable
from tests.plain_trainers import at, live
from tests.ray._hosts import HostUnderTest
from tests.ray._traces import find_replica_servers, is_alive, wait_until
from tests.stuck import grip

PR_SET_PDEATHSIG = 1


class LightHost(HostUnderTest):
    """The real host, forked from this process instead of started with torch."""

    def start(self, **changes):
        parent, self.pid = os.getpid(), os.fork()
        if self.pid:
            return
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            assert os.getppid() == parent
            fields = {**self.spec, **changes}
            spec = HostSpec(coordinator_address=CoordinatorAddress(**fields.pop("coordinator_address")), **fields)
            os.environ["TMPDIR"] = str(self.folder)  # by which its replica server is found
            assert take_folder(Path(spec.folder))
            write_to(Path(spec.folder) / "host.log")
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest has others
            Host(spec, os.pidfd_open(spec.raylet_pid), live).serve()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)


@contextmanager
def run_host(*, lease_s=60.0, **changes):
    """A host with these differences in its `HostSpec`."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    host = LightHost(folder, lease_s, {})
    try:
        host.start(**changes)
        host.hello = host.meet()
        yield host
    except BaseException:
        print(host.log.read_text() if host.log.exists() else "it has no log")
        raise
    finally:
        os.kill(host.pid, signal.SIGKILL)
        os.waitpid(host.pid, 0)
        host.close()
        shutil.rmtree(folder)


def assert_beats(host, *, for_s):
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        host.coordinator.expect(Beat, timeout_s=2)


def test_a_host_is_told_once_where_the_memories_are_and_each_trainer_that_goes_knows():
    with run_host() as host:
        host.claim(1, "a").expect(ClaimGranted)
        host.claim(1, "b").expect(ClaimGranted)
        for slot in "ab":
            host.join(1, slot)
        host.coordinator.link.send(
            ReplicaServersTold(
                attempt=1, replica_servers={"n1": ("h", 1), "n2": ("h", 2)}, peer=None, mean_s_between_losses=60.0
            )
        )
        for slot in "ab":
            host.go(1, slot)
            said = host.coordinator.expect(TrainerSaid, slot=slot).message
            assert said.row == {"replica_servers": ["n1", "n2"]}
        held = Holder(group=1, group_size=1)
        host.coordinator.expect(Beat, holders={"a": held, "b": held})


def test_a_killed_replica_server_is_back_at_its_place_within_10_s_and_neither_a_beat_nor_a_trainer_is_lost():
    with run_host() as host:
        host.claim(1).expect(ClaimGranted)
        pid = host.join(1)
        assert host.hello.replica_server is not None
        (replica_server,) = find_replica_servers(host.folder)
        killed_s = time.monotonic()
        os.kill(replica_server, signal.SIGKILL)
        assert host.coordinator.expect(ReplicaServerMoved).address is None
        assert host.coordinator.expect(ReplicaServerMoved).address == host.hello.replica_server
        assert time.monotonic() - killed_s < 10
        assert_beats(host, for_s=2)
        assert is_alive(pid)
        assert "the replica server is gone (signal 9); its snapshots with it" in host.log.read_text()


def test_a_host_whose_replica_server_cannot_start_serves_all_the_same_and_says_why():
    with run_host(node_ip="203.0.113.1") as host:  # TEST-NET-3: no address of this machine to listen at
        assert host.hello.replica_server is None
        host.claim(1).expect(ClaimGranted)
        pid = host.join(1)
        assert_beats(host, for_s=3)
        assert is_alive(pid)
        assert "the replica server did not start: the replica server ended while it started" in host.log.read_text()


def test_a_process_that_does_not_end_blocks_neither_its_host_nor_the_other_slots_and_its_own_only_until_it_ends():
    with run_host() as host:
        host.claim(1, "a").expect(ClaimGranted)
        host.claim(1, "b").expect(ClaimGranted)
        for slot in "ab":
            host.coordinator.expect(Claimed, slot=slot)
        pid = host.join(1, "a")
        other = host.join(1, "b")
        with grip(pid) as held:
            host.coordinator.link.send(Kill(slot=at("a"), attempt=1))
            killed_s = time.monotonic()
            stuck = host.coordinator.expect(Unkillable, timeout_s=10)
            assert 5 <= time.monotonic() - killed_s < 8
            assert (stuck.slot.name, stuck.attempt) == ("a", 1)
            assert f"process {pid} (state t" in stuck.reason
            assert "has not ended 5 s after SIGKILL" in stuck.reason
            assert_beats(host, for_s=2)
            host.coordinator.link.send(Leave(slot=at("b"), attempt=1))
            host.coordinator.expect(TrainerEnded, slot="b", attempt=1)
            assert host.join(2, "b") == other

            host.coordinator.link.send(Join(slot=at("a"), attempt=3))  # by a coordinator that does not know
            assert host.coordinator.expect(Unkillable, timeout_s=3).attempt == 3
            held.let_go()
            assert host.coordinator.expect(TrainerEnded, slot="a", attempt=1).outcome == "killed"
            assert host.coordinator.expect(TrainerEnded, slot="a", attempt=3).outcome == "killed"
        assert not is_alive(pid)
        assert host.join(4, "a") != pid


def test_a_host_ends_without_waiting_for_a_process_that_does_not():
    with run_host() as host:
        host.claim(1, "a").expect(ClaimGranted)
        pid = host.join(1, "a")
        with grip(pid) as held:
            host.coordinator.link.send(End(reason="the run is over", forget=False))
            host.coordinator.expect_end(timeout_s=4)
            assert is_alive(pid)
            held.let_go()
        wait_until(lambda: not is_alive(pid), timeout_s=5, what="the trainer ends")


def test_a_slot_whose_lease_ran_out_is_claimed_again_behind_what_has_not_ended_there():
    with run_host(lease_s=1.0) as host:
        agent, other = host.claim(1, "a"), host.claim(1, "b")
        agent.expect(ClaimGranted)
        other.expect(ClaimGranted)
        pid = host.join(1, "a")
        with grip(pid) as held:
            agent.link.close()
            host.coordinator.expect(Expired, slot="a")
            host.claim(2, "a").expect(ClaimGranted)
            host.coordinator.link.send(Join(slot=at("a"), attempt=2))
            assert host.coordinator.expect(Unkillable, timeout_s=10).attempt == 2
            held.let_go()
            assert host.coordinator.expect(TrainerEnded, slot="a", attempt=2).outcome == "killed"
        assert host.join(3, "a") != pid
