"""What ranks do about a notice: decided from four numbers by each, and agreed upon by counting."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elastic.training.interrupt import URGENCY, agree, decide, needs_copies

SECONDS = st.floats(min_value=0, max_value=1e6)
TIERS = st.sampled_from(["memory", "storage"])
WISHES = st.lists(st.sampled_from(["continue", *URGENCY]), min_size=1, max_size=50)


def urgency(decision) -> int:
    return ("continue", *URGENCY).index(decision)


def count(wishes) -> list[int]:
    return [wishes.count(decision) for decision in URGENCY]


@given(SECONDS | st.just(math.inf), SECONDS)
def test_a_planned_change_always_finishes_the_step_and_saves(rest_of_step_s, save_s):
    decision = decide(seconds_left=math.inf, rest_of_step_s=rest_of_step_s, save_s=save_s, margin=2.0)
    assert decision == "finish_and_save"


def test_the_step_is_finished_saved_before_or_given_up_by_what_is_left():
    # a save needs 2 x 10 s, the step 5 s more
    left_s = (25.1, 25.0, 20.1, 20.0, -1.0)
    decisions = [decide(seconds_left=s, rest_of_step_s=5.0, save_s=10.0, margin=2.0) for s in left_s]
    assert decisions == ["finish_and_save", "save_now", "save_now", "leave_now", "leave_now"]


def test_a_step_of_unknown_length_is_not_begun_before_a_deadline():
    assert decide(seconds_left=1e6, rest_of_step_s=math.inf, save_s=10.0, margin=2.0) == "save_now"


def test_a_deadline_that_has_passed_leaves_at_once_even_if_no_save_was_ever_measured():
    assert decide(seconds_left=-0.1, rest_of_step_s=0.0, save_s=0.0, margin=2.0) == "leave_now"


@given(SECONDS, SECONDS, SECONDS, SECONDS, st.fixed_dictionaries({"keep_in": TIERS, "is_snapshotting": st.booleans()}))
def test_more_time_never_makes_it_more_urgent(seconds_left, more_s, rest_of_step_s, save_s, how):
    def at(left_s):
        return decide(
            seconds_left=left_s,
            rest_of_step_s=rest_of_step_s,
            save_s=save_s,
            margin=2.0,
            **how,
        )

    assert urgency(at(seconds_left + more_s)) <= urgency(at(seconds_left))


@given(SECONDS, SECONDS, SECONDS)
def test_what_is_begun_fits_into_what_is_left_if_it_takes_its_usual_time(seconds_left, rest_of_step_s, save_s):
    needs_s = {"finish_and_save": rest_of_step_s + save_s, "save_now": save_s, "leave_now": 0.0}
    decision = decide(seconds_left=seconds_left, rest_of_step_s=rest_of_step_s, save_s=save_s, margin=2.0)
    assert needs_s[decision] <= seconds_left * (1 + 1e-9)


def test_all_train_on_until_the_snapshot_under_way_has_left_if_there_is_time():
    def at(left_s, *, is_snapshotting=True, keep_in="memory"):
        known = {"rest_of_step_s": 1.0, "save_s": 10.0, "copy_s": 20.0, "margin": 2.0}
        return decide(seconds_left=left_s, **known, keep_in=keep_in, is_snapshotting=is_snapshotting)

    # after the step twice 2 x 10 s, 1.5 s to form, and 2 x 20 s to fetch
    assert [at(s) for s in (math.inf, 82.6, 82.4, 20.5)] == [
        *("settle", "settle", "finish_and_hand_over", "hand_over_now"),
    ]
    assert at(math.inf, is_snapshotting=False) == "finish_and_hand_over"
    assert at(math.inf, keep_in="storage") == "finish_and_save"


@given(SECONDS, SECONDS)
def test_a_planned_change_copies_nothing_that_the_next_world_fetches_anyway(save_s, copy_s):
    assert not needs_copies(seconds_left=math.inf, save_s=save_s, copy_s=copy_s)


def test_a_state_is_copied_if_there_is_time_for_that_and_not_for_another_world_that_fetches_it():
    # 1 s to hand over and 10 s to fetch or to copy, and 1.5 s to form before one can fetch
    assert [needs_copies(seconds_left=s, save_s=1.0, copy_s=10.0) for s in (12.6, 12.4, 11.1, 10.9, 0)] == [
        *(False, True, True, False, False),
    ]


def test_five_seconds_are_enough_for_a_shard_of_eight_gigabytes():
    save_s, copy_s = 8.4 / 20, 8.4 / 8  # at 20 GB/s from the device, and 8 GB/s between nodes
    # of which two are for the end of the node
    left = {"seconds_left": 5 - 2, "save_s": save_s, "copy_s": copy_s}
    assert decide(**left, margin=2.0, rest_of_step_s=0.3, keep_in="memory") == "finish_and_hand_over"
    assert not needs_copies(**left)


KNOWN = st.fixed_dictionaries(
    {"seconds_left": SECONDS, "rest_of_step_s": SECONDS, "save_s": SECONDS, "is_snapshotting": st.booleans()}
)


@given(KNOWN, SECONDS, SECONDS)
def test_how_slow_copies_are_never_decides_whether_a_state_is_handed_over(known, copy_s, other_s):
    decisions = [decide(**known, copy_s=each, margin=2.0, keep_in="memory") for each in (copy_s, other_s)]
    assert decisions.count("leave_now") in (0, 2)


@given(WISHES)
def test_all_do_the_most_urgent_that_any_rank_wants(wishes):
    assert agree(count(wishes)) == max(wishes, key=urgency)


@given(WISHES, st.randoms())
def test_it_does_not_matter_which_rank_wants_what(wishes, random):
    shuffled = random.sample(wishes, len(wishes))
    assert agree(count(shuffled)) == agree(count(wishes))
