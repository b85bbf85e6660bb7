"""The host alone, with a process that SIGKILL does not end."""

import time

from cluster.runtime.messages import Beat, ClaimGranted, End
from cluster.types import Claimed, Join, Kill, Leave, TrainerEnded, Unkillable
from tests.plain_trainers import at
from tests.ray._traces import is_alive, wait_until
from tests.ray.test_host import run_host
from tests.stuck import grip


def assert_beats(host, *, for_s):
    """The host gives a sign of life every second."""
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        host.coordinator.expect(Beat, timeout_s=1.5)


def test_a_process_that_does_not_end_blocks_neither_its_host_nor_the_other_slots_and_its_own_only_until_it_ends():
    with run_host(lease_s=60.0) as host:
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
            assert_beats(host, for_s=3)
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
    with run_host(lease_s=60.0) as host:
        host.claim(1, "a").expect(ClaimGranted)
        host.coordinator.expect(Claimed, slot="a")
        pid = host.join(1, "a")
        with grip(pid) as held:
            host.coordinator.link.send(End(reason="the run is over", forget=False))
            host.coordinator.expect_end(timeout_s=4)
            assert is_alive(pid)
            held.let_go()
        wait_until(lambda: not is_alive(pid), timeout_s=5, what="the trainer ends")
