"""Which steps are bad, and that a normal run has none."""

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import FaultConfig
from elastic.training.spikes import MIN_LOSSES, MIN_RISE_NATS, WINDOW_STEPS, Recent, get_limit, judge, remember

THRESHOLD = FaultConfig().spike_threshold
LOSSES = st.lists(st.floats(min_value=0, max_value=20), min_size=MIN_LOSSES, max_size=WINDOW_STEPS)


def run(losses, *, threshold=THRESHOLD):
    """Return the verdict on each step of a run with these losses, and what is remembered at its end."""
    recent, verdicts = Recent(), []
    for step, loss in enumerate(losses, start=1):
        verdicts.append(judge(recent, loss, 1.0, threshold=threshold))
        recent = remember(recent, step=step, loss=loss, verdict=verdicts[-1])
    return verdicts, recent


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_what_is_not_finite_is_bad_whatever_came_before(loss, grad_norm):
    assert judge(Recent(), loss, grad_norm, threshold=0) == "not_finite"


def test_a_spike_lies_above_the_median_by_deviations_and_by_nats():
    # median 3, deviations 0.2 for half of the losses: 20 * 1.4826 * 0.2 = 5.93
    wide = [2.8, 3.2, 2.8, 3.2, 3.0] * 5
    assert get_limit(wide, threshold=20.0) == pytest.approx(8.93, abs=0.01)
    assert get_limit([3.0] * 25, threshold=20.0) == 6.0  # no deviation at all: 3 nats
    assert judge(Recent(losses=[3.0] * 25), 6.0, 1.0, threshold=20.0) == "good"
    assert judge(Recent(losses=[3.0] * 25), 6.01, 1.0, threshold=20.0) == "spike"


@given(LOSSES)
def test_threshold_0_never_sees_a_spike(losses):
    assert judge(Recent(losses=losses), 1e30, 1.0, threshold=0) == "good"


@given(LOSSES, st.data(), st.floats(min_value=0, max_value=1e3))
def test_a_loss_up_to_3_nats_over_the_median_is_never_a_spike(losses, data, threshold):
    loss = data.draw(st.floats(min_value=-10, max_value=statistics.median(losses) + MIN_RISE_NATS))
    assert judge(Recent(losses=losses), loss, 1.0, threshold=threshold) == "good"


@given(LOSSES, st.floats(min_value=0, max_value=1e3), st.floats(min_value=0, max_value=100))
def test_judging_is_monotonic_in_the_loss(losses, loss, more):
    if judge(Recent(losses=losses), loss, 1.0, threshold=THRESHOLD) == "spike":
        assert judge(Recent(losses=losses), loss + more, 1.0, threshold=THRESHOLD) == "spike"


@given(st.integers(0, 2**32), st.floats(min_value=0, max_value=0.5), st.floats(min_value=5, max_value=200))
def test_a_normal_run_has_no_bad_step(seed, noise, scale):
    """From ln(50257) down to 2 nats at any speed, with batches that differ by up to half a nat, and a warm-up hump."""
    noises = random.Random(seed)
    losses = [
        2.0 + 8.8 * math.exp(-step / scale) + (1.0 if 10 < step < 30 else 0.0) + noises.gauss(0, noise)
        for step in range(400)
    ]
    assert set(run(losses)[0]) == {"good"}


def test_bad_steps_do_not_change_what_later_ones_are_judged_by():
    calm = [3.0 + 0.01 * (step % 7) for step in range(50)]
    with_spikes = [*calm[:30], 9.0, math.nan, *calm[30:40], 9.0, *calm[40:]]
    verdicts, recent = run(with_spikes)
    assert [step for step, verdict in enumerate(verdicts, start=1) if verdict != "good"] == [31, 32, 43]
    assert recent.losses == run(calm)[1].losses
    assert recent.bad_steps == [31, 32, 43]


@given(st.lists(st.sampled_from([3.0, 3.1, 9.0, math.nan]), max_size=300))
def test_bad_steps_are_counted_over_the_last_steps_only(losses):
    verdicts, recent = run(losses)
    bad = [step for step, verdict in enumerate(verdicts, start=1) if verdict != "good"]
    assert list(recent.bad_steps) == [step for step in bad if step > len(losses) - WINDOW_STEPS]
    assert len(recent.losses) <= WINDOW_STEPS


@given(st.lists(st.floats(min_value=0, max_value=20), max_size=150), st.integers(0, 150))
def test_a_run_that_is_saved_and_resumed_judges_the_same(losses, cut):
    whole, end = run(losses)
    verdicts, recent = run(losses[:cut])
    recent = Recent(**json.loads(json.dumps(asdict(recent))))
    for step, loss in enumerate(losses[cut:], start=len(losses[:cut]) + 1):
        verdicts.append(judge(recent, loss, 1.0, threshold=THRESHOLD))
        recent = remember(recent, step=step, loss=loss, verdict=verdicts[-1])
    assert verdicts == whole
    assert (list(recent.losses), list(recent.bad_steps)) == (list(end.losses), list(end.bad_steps))


def test_an_overflow_of_fp16_is_neither_bad_nor_compared_with():
    assert asdict(remember(Recent(), step=1, loss=math.inf, verdict="overflow")) == {"losses": [], "bad_steps": []}
