"""What ranks do about a notice depends on nothing but three numbers that all of them know."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elastic.interrupt import decide

SECONDS = st.floats(min_value=0, max_value=1e6)


@given(SECONDS, SECONDS)
def test_without_a_notice_training_goes_on(seconds_left, usual_save_s):
    assert decide(has_notice=False, seconds_left=seconds_left, usual_save_s=usual_save_s, margin=2.0) == "continue"


@given(SECONDS)
def test_a_planned_change_always_saves(usual_save_s):
    assert decide(has_notice=True, seconds_left=math.inf, usual_save_s=usual_save_s, margin=2.0) == "save_and_leave"


def test_a_save_is_begun_only_if_margin_times_its_usual_time_is_left():
    assert decide(has_notice=True, seconds_left=20.1, usual_save_s=10.0, margin=2.0) == "save_and_leave"
    assert decide(has_notice=True, seconds_left=20.0, usual_save_s=10.0, margin=2.0) == "leave_now"


def test_a_deadline_that_has_passed_leaves_at_once_even_if_no_save_was_ever_measured():
    assert decide(has_notice=True, seconds_left=-0.1, usual_save_s=0.0, margin=2.0) == "leave_now"


@given(SECONDS, SECONDS, SECONDS)
def test_more_time_never_turns_a_save_into_leaving(seconds_left, more_s, usual_save_s):
    early = decide(has_notice=True, seconds_left=seconds_left, usual_save_s=usual_save_s, margin=2.0)
    late = decide(has_notice=True, seconds_left=seconds_left + more_s, usual_save_s=usual_save_s, margin=2.0)
    assert early == "leave_now" or late == "save_and_leave"
