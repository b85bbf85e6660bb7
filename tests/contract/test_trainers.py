"""The slots of a host with real processes, forked as trainers are, that know nothing of torch: how they end."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import TrainerSaid
from cluster.runtime.node.host_spec import HostSpec
from cluster.runtime.trainers import forked
from cluster.runtime.trainers import slots as module
from cluster.runtime.trainers.slots import Place, Trainers
from cluster.types import Claimed, Leave, TrainerDying, TrainerEnded, Unkillable
from tests.plain_trainers import NODE, at, is_said, live
from tests.stuck import grip

CONFIG = {
    "checkpoint": {"memory": "off"},
    "cluster": {"gpus_per_worker": 0, "spare_trainers": False},
    "compile": False,
    "fault": {"silent_s": 60.0},
}


class Slots:
    """What a host has, with a loop that the test turns, and how long the longest turn took."""

    def __init__(self, folder):
        self.told = []
        self.loop = EventLoop()
        spec = HostSpec(
            node=NODE, node_ip="127.0.0.1", folder=str(folder), raylet_pid=1, secret="x", lease_s=60.0, config=CONFIG,
            coordinator_address=CoordinatorAddress(generation=1, host="h", port=1),
        )  # fmt: skip
        self.trainers = Trainers(spec, self.loop, tell=self._tell, live=live)
        self.places: dict[str, Place] = {}
        self.folder = Path(folder)
        self.longest_s = 0.0

    def _tell(self, message):
        self.told.append(message)
        return True

    def open(self, name):
        place = Place(name=name, log=self.folder / f"{name}.log", env={}, group=1, agent=None)
        place.claim = Claimed(slot=at(name), group=1, group_size=1, agent_pid=1)
        self.places[name] = place
        self.trainers.provide(place)
        self.expect(Claimed, slot=name)
        return place

    def turn(self):
        start_s = time.monotonic()
        self.loop.turn(0.02)
        for place in self.places.values():
            self.trainers.check(place)
        self.longest_s = max(self.longest_s, time.monotonic() - start_s)

    def expect(self, kind, *, timeout_s=10.0, **fields):
        """Return the first message of a kind with these fields."""
        until_s = time.monotonic() + timeout_s
        while True:
            for message in self.told:
                if is_said(message, kind, fields):
                    self.told.remove(message)
                    return message
            assert time.monotonic() < until_s, f"no {kind.__name__} with {fields}: {self.told}"
            self.turn()

    def join(self, place, attempt):
        """Return the process that has joined a world."""
        self.trainers.join(place, attempt)
        return self.expect(TrainerSaid, slot=place.name, attempt=attempt).message.pid


@contextmanager
def open_slots(folder):
    slots = Slots(folder)
    try:
        yield slots
    finally:
        slots.trainers.end_all(slots.places.values(), limit_s=5.0)
        selector = slots.loop._selector
        for source in [key.fileobj for key in selector.get_map().values()]:
            slots.loop.unwatch(source)
        selector.close()


@pytest.fixture
def slots(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNKILLABLE_S", 0.3)
    with open_slots(tmp_path) as slots:
        yield slots


def test_a_killed_trainer_is_told_and_replaced(slots):
    place = slots.open("a")
    pid = slots.join(place, 1)
    place.trainer.kill()
    assert slots.expect(TrainerEnded, slot="a", attempt=1).outcome == "killed"
    assert slots.join(place, 2) != pid


def test_one_that_crashes_is_told_with_its_signal(slots):
    place = slots.open("a")
    os.kill(slots.join(place, 1), signal.SIGKILL)
    left = slots.expect(TrainerEnded, slot="a", attempt=1)
    assert (left.outcome, left.reason) == ("crashed", "trainer ended with signal 9 (SIGKILL)")


def test_one_that_the_kernel_takes_down_is_told_before_it_has_ended_and_once(slots, monkeypatch):
    place, other = slots.open("a"), slots.open("b")
    pid = slots.join(place, 1)
    slots.join(other, 1)
    monkeypatch.setattr(module, "is_exiting", lambda number: number == pid)
    slots.expect(TrainerDying, slot="a", attempt=1)
    slots.turn()
    assert not [message for message in slots.told if isinstance(message, TrainerDying)]
    other.trainer.kill()
    monkeypatch.setattr(module, "is_exiting", lambda _: True)
    slots.expect(TrainerEnded, slot="b", attempt=1)
    assert not [message for message in slots.told if isinstance(message, TrainerDying)], "that is wanted"


def test_a_process_that_does_not_end_holds_up_neither_the_loop_nor_other_slots_and_its_own_only_until_it_ends(slots):
    a, b = slots.open("a"), slots.open("b")
    pid, other = slots.join(a, 1), slots.join(b, 1)
    with grip(pid) as held:
        a.trainer.kill()
        stuck = slots.expect(Unkillable, slot="a")
        assert stuck.attempt == 1
        assert f"process {pid} (state t" in stuck.reason
        assert "after SIGKILL" in stuck.reason
        b.trainer.link.send(Leave(slot=at("b"), attempt=1))
        slots.expect(TrainerEnded, slot="b", attempt=1)
        assert slots.join(b, 2) == other
        for _ in range(50):
            slots.turn()
        assert not [message for message in slots.told if isinstance(message, Unkillable)], "it is told once"
        held.let_go()
        assert slots.expect(TrainerEnded, slot="a", attempt=1).outcome == "killed"
    assert slots.join(a, 3) != pid
    assert slots.longest_s < 0.5


def test_a_world_that_wants_the_slot_meanwhile_is_told_and_the_slot_is_given_back_afterwards(slots):
    place = slots.open("a")
    pid = slots.join(place, 1)
    with grip(pid) as held:
        slots.trainers.join(place, 2)  # by a coordinator that does not know the first world
        assert slots.expect(Unkillable, slot="a").attempt == 2
        held.let_go()
        assert slots.expect(TrainerEnded, slot="a", attempt=1).outcome == "killed"
        assert slots.expect(TrainerEnded, slot="a", attempt=2).outcome == "killed"
    assert slots.join(place, 3) != pid


def test_a_world_of_an_unknown_coordinator_is_left_for_the_next_one_without_waiting(slots):
    place = slots.open("a")
    pid = slots.join(place, 1)
    assert slots.join(place, 2) != pid
    assert slots.longest_s < 0.5


def test_a_world_that_is_given_up_before_its_trainer_could_join_is_answered(slots):
    place = slots.open("a")
    with grip(slots.join(place, 1)) as held:
        slots.trainers.join(place, 2)
        slots.trainers.give_up_joining(place, 2)
        assert slots.expect(TrainerEnded, slot="a", attempt=2).outcome == "lost"
        held.let_go()
        slots.expect(TrainerEnded, slot="a", attempt=1)


def test_a_slot_that_is_cleared_gets_nothing_until_it_is_claimed_again(slots):
    place = slots.open("a")
    slots.join(place, 1)
    slots.trainers.clear(place)
    slots.expect(TrainerEnded, slot="a", attempt=1)
    assert place.trainer is None


def test_the_end_of_all_waits_for_those_that_end_and_leaves_the_others_behind(tmp_path, capfd):
    with open_slots(tmp_path) as slots:
        a, b = slots.open("a"), slots.open("b")
        stuck, other = slots.join(a, 1), slots.join(b, 1)
        with grip(stuck) as held:
            start_s = time.monotonic()
            slots.trainers.end_all([a, b], limit_s=1.0)
            assert 1.0 <= time.monotonic() - start_s < 2.0
            assert f"process {stuck} is left behind: state t" in capfd.readouterr().out
            assert not Path(f"/proc/{other}").exists()
            held.let_go()
        os.waitpid(stuck, 0)
        slots.places = {}


def test_a_trainer_that_the_kernel_has_no_process_for_costs_its_slot_only(slots, monkeypatch):
    a, b = slots.open("a"), slots.open("b")
    pid, other = slots.join(a, 1), slots.join(b, 1)

    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(forked.os, "fork", refuse)
    os.kill(pid, signal.SIGKILL)
    slots.expect(TrainerEnded, slot="a", attempt=1)
    slots.trainers.join(a, 2)
    assert "no trainer could be forked" in slots.expect(TrainerEnded, slot="a", attempt=2).reason
    assert Path(f"/proc/{other}").exists()
    monkeypatch.undo()
    assert slots.join(a, 3)
