"""What a process that was killed and does not end costs: its slot, then its node, and never the others' time."""

import pytest

from cluster.types import (
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    GiveUp,
    HostGone,
    Join,
    LeaveOut,
    Slot,
    Stop,
    TakeBack,
    Tick,
    TrainerEnded,
    TrainerReady,
    Unkillable,
)
from tests.unit.test_controller import A, B, C, decide, make
from tests.unit.test_stalls import stall

TICK_S = 0.2


class Fleet:
    """A world of which some members do not end, whatever they are told."""

    def __init__(self, *slots, stuck=(), **policy):
        self.state = make(*slots, **policy).state
        self.stuck = set(stuck)
        self.now_s = 0.0
        self.log: list = []

    def tell(self, event):
        for action in decide(self.state, event, now_s=self.now_s):
            self.log.append((self.now_s, action))
            slot, attempt = getattr(action, "slot", None), getattr(action, "attempt", 0)
            if slot in self.stuck:
                continue
            match type(action).__name__:
                case "Join":
                    self.tell(TrainerReady(slot=slot, attempt=attempt, store_host="h", store_port=1))
                case "Leave" | "Park" | "Kill":
                    self.tell(TrainerEnded(slot=slot, attempt=attempt, outcome="lost", reason="told"))

    def wait(self, seconds):
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self.tell(Tick())

    def let_go(self, slot, attempt=1):
        self.stuck.discard(slot)
        self.tell(TrainerEnded(slot=slot, attempt=attempt, outcome="killed", reason="the kernel let go"))

    def of(self, kind):
        return [action for _, action in self.log if isinstance(action, kind)]

    @property
    def worlds(self):
        return [action.members for action in self.of(AttemptStarted)]


def test_the_others_train_on_within_15_s_of_the_first_complaint():
    fleet = Fleet(A, B, C, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.wait(15)
    assert fleet.worlds == [(A, C)]
    assert fleet.state.stage == "running"
    (left_out,) = fleet.of(LeaveOut)
    assert left_out.slot == B
    assert left_out.reason == "its process has not ended within 8 s after it was killed"


def test_they_do_so_at_once_if_its_host_has_found_that_it_does_not_end():
    fleet = Fleet(A, B, C, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.tell(Unkillable(slot=B, attempt=1, reason="process 7 is in state D"))
    assert fleet.worlds == [(A, C)]
    assert fleet.of(LeaveOut) == [LeaveOut(slot=B, reason="process 7 is in state D")]
    assert [ended.change for ended in fleet.of(AttemptEnded)] == ["trainer_stalled"], "why it ended is known better"


def test_a_world_that_forms_does_without_a_slot_in_which_an_older_process_does_not_end():
    fleet = Fleet(A, B, C, stuck=[B])
    fleet.tell(HostGone(node="c", reason="gone"))
    fleet.tell(Unkillable(slot=B, attempt=1, reason="process 7 is in state D"))
    assert fleet.worlds == [(A,)]


def test_a_run_that_is_stopped_ends_without_waiting_for_it():
    fleet = Fleet(A, B, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.tell(Stop(reason="keyboard"))
    fleet.wait(12)
    assert fleet.of(Done) == [Done(kind="interrupted", reason="keyboard", exit_code=3)]
    fleet.let_go(B)
    assert fleet.of(TakeBack) == [], "it acts after its end"


def test_its_slot_trains_again_once_the_process_has_ended():
    fleet = Fleet(A, B, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.wait(12)
    assert fleet.worlds == [(A,)]
    fleet.let_go(B, attempt=7)  # of another process, long ago
    assert fleet.of(TakeBack) == []
    fleet.let_go(B)
    (back,) = fleet.of(TakeBack)
    assert back.slot == B
    assert back.after_s == pytest.approx(12 - 8.2, abs=0.5)
    fleet.tell(stall(A, "silent", attempt=2))
    assert fleet.worlds == [(A,), (A, B)]


def test_a_slot_that_nobody_else_can_replace_is_waited_for():
    fleet = Fleet(A, B, stuck=[B], sizes=(2,))
    fleet.tell(stall(B, "silent"))
    fleet.wait(30)
    assert fleet.state.stage == "waiting"
    fleet.let_go(B)
    assert fleet.worlds == [(A, B)]


def test_a_node_on_which_nothing_can_train_is_given_up_after_a_minute_once():
    fleet = Fleet(A, B, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.wait(60)
    assert fleet.of(GiveUp) == []
    fleet.wait(60)
    (given_up,) = fleet.of(GiveUp)
    assert given_up.node == "b"
    assert "nothing on it can train for 60 s: its process has not ended within 8 s" in given_up.reason


def test_a_node_that_trains_in_another_slot_is_kept():
    other = Slot("b", "cpu1")
    fleet = Fleet(A, B, other, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.wait(120)
    assert fleet.worlds == [(A, other)]
    assert fleet.of(GiveUp) == []


def test_the_next_host_of_a_node_begins_with_a_clean_sheet():
    fleet = Fleet(A, B, stuck=[B])
    fleet.tell(stall(B, "silent"))
    fleet.wait(120)
    fleet.stuck.clear()
    fleet.tell(HostGone(node="b", reason="gone"))
    fleet.tell(Claimed(slot=B, group=1, group_size=2))
    fleet.tell(stall(A, "silent", attempt=2))
    assert fleet.worlds[-1] == (A, B)
    assert [join.slot for join in fleet.of(Join)][-2:] == [A, B]
