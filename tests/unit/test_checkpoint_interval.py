import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.interval import (
    SaveCost,
    estimate_mean_s_between_losses,
    get_best_interval_s,
    plan_every_steps,
)

SECONDS = st.floats(1e-3, 1e6)


def get_overhead(interval_s, *, cost_s, mean_s):
    """Return the expected time per second of work, with losses that come exponentially.

    Source: Daly 2006, equation 20, restart time left out: it is paid per loss, whatever the interval.
    """
    return mean_s * math.expm1((interval_s + cost_s) / mean_s) / interval_s


def test_a_minute_of_stall_and_a_loss_a_day_are_saved_every_53_minutes():
    # sqrt(2 * 60 * 86400) = 3220 s, Daly's correction + 20 s, less the save itself: 3180 s
    assert get_best_interval_s(cost_s=60, mean_s_between_losses=86400) == pytest.approx(3180, abs=1)


# the estimate is for saves that are cheap beside the time between losses
@given(mean_s=SECONDS, share=st.floats(1e-6, 0.5), factor=st.floats(0.3, 0.9) | st.floats(1.1, 3))
def test_no_other_interval_loses_noticeably_less(mean_s, share, factor):
    cost_s = share * mean_s
    best_s = get_best_interval_s(cost_s=cost_s, mean_s_between_losses=mean_s)
    best = get_overhead(best_s, cost_s=cost_s, mean_s=mean_s)
    assert best <= get_overhead(best_s * factor, cost_s=cost_s, mean_s=mean_s) * 1.005


@given(cost_s=SECONDS, mean_s=SECONDS)
def test_the_interval_is_a_time(cost_s, mean_s):
    assert 0 < get_best_interval_s(cost_s=cost_s, mean_s_between_losses=mean_s) < math.inf


@given(stall_s=st.floats(0, 1e3), busy_s=st.floats(0, 1e3), step_s=st.floats(1e-3, 1e3), mean_s=SECONDS)
def test_the_plan_waits_for_the_save_ahead_and_else_not_longer_than_allowed(stall_s, busy_s, step_s, mean_s):
    cost = SaveCost(stall_s=stall_s, busy_s=busy_s)
    steps = plan_every_steps(cost=cost, step_s=step_s, mean_s_between_losses=mean_s, longest_s=600)
    assert steps >= 1
    assert steps * step_s >= busy_s * (1 - 1e-9)
    assert steps * step_s <= max(600, busy_s + step_s, step_s) * (1 + 1e-9)


def test_a_save_that_costs_nothing_is_made_at_every_step():
    free = SaveCost(stall_s=0, busy_s=0.1)
    assert plan_every_steps(cost=free, step_s=0.3, mean_s_between_losses=3600, longest_s=600) == 1


@given(assumed_s=SECONDS, observed_s=st.floats(0, 1e9), num_losses=st.integers(0, 1000))
def test_the_estimate_lies_between_assumption_and_observation(assumed_s, observed_s, num_losses):
    mean_s = estimate_mean_s_between_losses(assumed_s=assumed_s, observed_s=observed_s, num_losses=num_losses)
    seen_s = observed_s / num_losses if num_losses else math.inf
    assert min(assumed_s, seen_s) * (1 - 1e-9) <= mean_s <= max(assumed_s, seen_s) * (1 + 1e-9)
