"""When saves are due: at fixed steps, or where planned costs are least."""

import math

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.interval import SaveCost
from elastic.checkpoint.schedule import Pace

FREE = SaveCost(stall_s=0.0, busy_s=0.0)


def make(*, every_steps=0, start_step=0, at_first=False, first_cost=FREE, mean_s=3600.0, longest_s=1800.0):
    return Pace(
        every_steps=every_steps,
        start_step=start_step,
        at_first=at_first,
        first_cost=first_cost,
        mean_s_between_losses=mean_s,
        longest_s=longest_s,
    )


def run(pace, steps):
    """Return the steps after which a save was started, if all of them could be."""
    started = []
    for step in steps:
        if pace.is_due(step):
            pace.started(step)
            started.append(step)
    return started


def test_fixed_steps_are_those_of_the_run_and_not_of_the_attempt():
    assert run(make(every_steps=5, start_step=7), range(8, 21)) == [10, 15, 20]


def test_a_first_save_comes_after_the_first_step_whatever_the_rhythm():
    assert run(make(every_steps=5, start_step=7, at_first=True), range(8, 16)) == [8, 10, 15]


def test_nothing_is_planned_before_the_ranks_have_agreed():
    pace = make()
    assert run(pace, range(1, 10)) == []
    pace.agree(4)
    assert run(pace, range(10, 20)) == [10, 14, 18]


def test_a_skipped_save_is_due_until_it_is_started():
    pace = make(every_steps=0)
    pace.agree(3)
    assert [pace.is_due(step) for step in (2, 3, 4)] == [False, True, True]
    pace.started(4)
    assert [pace.is_due(step) for step in (5, 6, 7)] == [False, False, True]


def test_what_may_be_lost_is_bounded_as_long_as_saves_take_no_more_than_their_share():
    def plan_s(stall_s):
        pace = Pace(
            every_steps=0,
            start_step=0,
            at_first=True,
            first_cost=FREE,
            mean_s_between_losses=1e6,  # Young alone would save every 45 s and more
            longest_s=3.0,
            most_share=0.005,
        )
        pace.measured(SaveCost(stall_s=stall_s, busy_s=0.5))
        return pace.plan(step_s=0.1) / 10

    # 0.5 % of 3 s are 15 ms
    assert [plan_s(stall_s) for stall_s in (0.001, 0.014, 0.0301)] == [3.0, 3.0, 6.0]


def test_the_plan_is_young_s_of_what_was_measured_and_no_more_of_what_was_assumed():
    pace = make(first_cost=SaveCost(stall_s=100.0, busy_s=100.0), mean_s=5000.0)
    for _ in range(3):
        pace.measured(SaveCost(stall_s=0.01, busy_s=0.05))
    # sqrt(2 * 0.01 * 5000) = 10 s, of steps of half a second
    assert pace.plan(step_s=0.5) in (19, 20)


@given(
    st.floats(min_value=0, max_value=100),
    st.floats(min_value=0, max_value=100),
    st.floats(min_value=1e-3, max_value=100),
    st.floats(min_value=1, max_value=1e6),
)
def test_a_plan_never_starts_a_save_before_the_last_one_can_have_ended(stall_s, busy_s, step_s, mean_s):
    pace = make(mean_s=mean_s)
    pace.measured(SaveCost(stall_s=stall_s, busy_s=busy_s))
    every_steps = pace.plan(step_s)
    assert every_steps >= max(1, math.floor(busy_s / step_s))
    assert every_steps * step_s <= max(1800.0, busy_s + step_s, step_s)
