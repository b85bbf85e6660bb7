"""What ranks do about a notice: decided from four numbers by each, and agreed upon by counting."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elastic.interrupt import URGENCY, agree, decide, needs_copies

SECONDS = st.floats(min_value=0, max_value=1e6)
TIERS = st.sampled_from(["memory", "storage"])
WISHES = st.lists(st.sampled_from(["continue", *URGENCY]), min_size=1, max_size=50)


def urgency(decision) -> int:
    return ("continue", *URGENCY).index(decision)


def count(wishes) -> list[int]:
    return [wishes.count(decision) for decision in URGENCY]


@given(SECONDS | st.just(math.inf), SECONDS)
def test_a_planned_change_always_finishes_the_step_and_saves(rest_of_step_s, usual_save_s):
    decision = decide(seconds_left=math.inf, rest_of_step_s=rest_of_step_s, usual_save_s=usual_save_s, margin=2.0)
    assert decision == "finish_and_save"


def test_the_step_is_finished_saved_before_or_given_up_by_what_is_left():
    # a save needs 2 x 10 s, the step 5 s more
    left_s = (25.1, 25.0, 20.1, 20.0, -1.0)
    decisions = [decide(seconds_left=s, rest_of_step_s=5.0, usual_save_s=10.0, margin=2.0) for s in left_s]
    assert decisions == ["finish_and_save", "save_now", "save_now", "leave_now", "leave_now"]


def test_a_step_of_unknown_length_is_not_begun_before_a_deadline():
    assert decide(seconds_left=1e6, rest_of_step_s=math.inf, usual_save_s=10.0, margin=2.0) == "save_now"


def test_a_deadline_that_has_passed_leaves_at_once_even_if_no_save_was_ever_measured():
    assert decide(seconds_left=-0.1, rest_of_step_s=0.0, usual_save_s=0.0, margin=2.0) == "leave_now"


@given(SECONDS, SECONDS, SECONDS, SECONDS, st.fixed_dictionaries({"keep_in": TIERS, "is_keeping": st.booleans()}))
def test_more_time_never_makes_it_more_urgent(seconds_left, more_s, rest_of_step_s, usual_save_s, how):
    def at(left_s):
        return decide(
            seconds_left=left_s,
            rest_of_step_s=rest_of_step_s,
            usual_save_s=usual_save_s,
            margin=2.0,
            **how,
        )

    assert urgency(at(seconds_left + more_s)) <= urgency(at(seconds_left))


@given(SECONDS, SECONDS, SECONDS)
def test_what_is_begun_fits_into_what_is_left_if_it_takes_its_usual_time(seconds_left, rest_of_step_s, usual_save_s):
    needs_s = {"finish_and_save": rest_of_step_s + usual_save_s, "save_now": usual_save_s, "leave_now": 0.0}
    decision = decide(seconds_left=seconds_left, rest_of_step_s=rest_of_step_s, usual_save_s=usual_save_s, margin=2.0)
    assert needs_s[decision] <= seconds_left * (1 + 1e-9)


def test_all_train_on_until_the_snapshot_under_way_is_safe_if_there_is_time():
    def at(left_s, *, is_keeping=True, keep_in="memory"):
        usual = {"rest_of_step_s": 1.0, "usual_save_s": 10.0, "margin": 2.0}
        return decide(seconds_left=left_s, **usual, keep_in=keep_in, is_keeping=is_keeping)

    # after the step 5 s to form, and three times 2 x 10 s
    assert [at(s) for s in (math.inf, 66.1, 65.9, 20.5)] == [
        *("settle", "settle", "finish_and_hand_over", "hand_over_now"),
    ]
    assert at(math.inf, is_keeping=False) == "finish_and_hand_over"
    assert at(math.inf, keep_in="storage") == "finish_and_save"


@given(st.none() | SECONDS)
def test_a_planned_change_copies_nothing_that_the_next_world_fetches_anyway(usual_save_s):
    assert not needs_copies(seconds_left=math.inf, usual_save_s=usual_save_s, margin=2.0)


def test_a_state_is_copied_if_its_node_may_be_gone_before_the_next_world_is_safe_without_it():
    # 5 s to form, and 2 x 10 s each to hand over, to fetch and to keep anew
    assert [needs_copies(seconds_left=s, usual_save_s=10.0, margin=2.0) for s in (65.1, 64.9, 0.0)] == [
        False,
        True,
        True,
    ]
    assert needs_copies(seconds_left=1e6, usual_save_s=None, margin=2.0)


@given(WISHES)
def test_all_do_the_most_urgent_that_any_rank_wants(wishes):
    assert agree(count(wishes)) == max(wishes, key=urgency)


@given(WISHES, st.randoms())
def test_it_does_not_matter_which_rank_wants_what(wishes, random):
    shuffled = random.sample(wishes, len(wishes))
    assert agree(count(shuffled)) == agree(count(wishes))
