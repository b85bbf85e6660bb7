"""Who is blamed for a world that makes no progress, and what the controller does about it."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.controller.stalls import find_culprits
from cluster.types import AttemptEnded, AttemptStarted, Done, Kill, Leave, Slot, Stalled
from tests.unit.test_controller import A, B, C, make

SLOTS = (A, B, C)
WAITING = ("in a collective", "waiting", "saving")
BUSY = ("computing", "loading data", "loading a checkpoint", "writing its rows")
WHERES = st.dictionaries(st.sampled_from(SLOTS), st.sampled_from([*WAITING, *BUSY, "silent"]))


def stall(slot, where, *, attempt=1, step=0):
    return Stalled(slot=slot, attempt=attempt, step=step, where=where)


def complaints(wheres):
    return {slot: stall(slot, where) for slot, where in wheres.items()}


@given(WHERES)
def test_whoever_waits_for_peers_is_never_to_blame(wheres):
    culprits = find_culprits(complaints(wheres), SLOTS)
    assert all(wheres[slot] not in WAITING for slot in culprits or ())


@given(WHERES)
def test_who_is_silent_is_to_blame_at_once_and_nobody_else_then(wheres):
    silent = {slot for slot, where in wheres.items() if where == "silent"}
    culprits = find_culprits(complaints(wheres), SLOTS)
    if silent:
        assert set(culprits) == silent


@given(WHERES)
def test_nothing_is_done_while_someone_is_within_its_limit_and_nobody_is_to_blame(wheres):
    if len(wheres) < len(SLOTS) and set(wheres.values()) <= set(WAITING):
        assert find_culprits(complaints(wheres), SLOTS) is None


@given(WHERES)
def test_a_world_in_which_all_complain_ends(wheres):
    if len(wheres) == len(SLOTS):
        assert find_culprits(complaints(wheres), SLOTS) is not None


def test_a_rank_that_hangs_by_itself_is_told_from_those_that_wait_for_it():
    waiting = complaints({A: "in a collective", C: "waiting"})
    assert find_culprits(waiting, SLOTS) is None
    assert find_culprits({**waiting, B: stall(B, "loading data")}, SLOTS) == (B,)


def test_a_machine_on_which_all_are_slow_is_nobody_s_fault():
    assert find_culprits(complaints(dict.fromkeys(SLOTS, "computing")), SLOTS) == ()
    assert find_culprits(complaints({A: "computing"}), [A]) == (A,)


def test_a_frozen_trainer_is_killed_and_named_and_the_others_leave():
    cluster = make(A, B, C)
    cluster.tell(stall(B, "silent", step=7))
    (ended,) = cluster.of(AttemptEnded)
    assert (ended.change, ended.kind, ended.cause) == ("trainer_stalled", "lost", "b")
    assert ended.reason == "no progress after step 7: rank 1 is frozen (no sign of life)"
    assert [kill.slot for kill in cluster.of(Kill)] == [B]
    assert {leave.slot for leave in cluster.of(Leave)} == {A, C}
    assert cluster.worlds == [(A, B, C), (A, B, C)]


def test_a_node_that_holds_up_two_worlds_in_a_row_is_left_out():
    cluster = make(A, B, C)
    for attempt in (1, 2):
        cluster.tell(stall(B, "silent", attempt=attempt))
    assert cluster.worlds == [(A, B, C), (A, B, C), (A, C)]
    assert cluster.of(AttemptEnded)[-1].denied == "b"


def test_a_world_that_waits_for_itself_ends_without_a_name():
    cluster = make(A, B)
    for slot in (A, B):
        cluster.tell(stall(slot, "in a collective"))
    (ended,) = cluster.of(AttemptEnded)
    assert (ended.change, ended.cause) == ("trainer_stalled", None)
    assert ended.reason == "no progress after step 0: all ranks wait for each other"


def test_a_step_of_any_member_takes_the_complaints_before_it_back():
    cluster = make(A, B)
    cluster.tell(stall(A, "in a collective", step=4))
    cluster.step(5)
    cluster.tell(stall(B, "in a collective", step=5))
    assert cluster.of(AttemptEnded) == []
    cluster.tell(stall(A, "in a collective", step=5))
    assert len(cluster.of(AttemptEnded)) == 1


def test_what_an_older_world_complains_of_is_not_heard():
    cluster = make(A, B)
    cluster.tell(stall(A, "silent"))
    cluster.tell(stall(A, "silent"))
    assert len(cluster.of(AttemptStarted)) == 2


def test_a_run_that_only_ever_hangs_ends():
    cluster = make(Slot("a", "cpu0"))
    for attempt in (1, 2, 3):
        cluster.tell(stall(A, "silent", attempt=attempt))
    assert isinstance(cluster.done, Done)
    assert "step 1 failed 3 times in a row" in cluster.done.reason
