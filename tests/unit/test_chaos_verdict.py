"""What a run trained on against what it should have, and how well it used its time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chaos.verdict import count_samples, measure_goodput
from cluster.hazard import predict_goodput
from cluster.ledger import LedgerRow
from elastic.data.order import rank_slice, sample_ids
from elastic.records.rundir import format_utc

GLOBAL_BATCH = 6


def expect(step):
    return sample_ids(seed=1, step=step - 1, global_batch=GLOBAL_BATCH, num_samples=50).tolist()


def row(step, attempt, **more):
    return {"step": step, "attempt": attempt, **more}


def tile(node, start_s, end_s, state):
    return LedgerRow(node=node, start_ms=int(start_s * 1000), end_ms=int(end_s * 1000), state=state, gpus=1, usd=0.0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_run_that_goes_back_and_changes_its_world_loses_and_repeats_nothing(attempts):
    """Each attempt has a world size, does some steps, and is then set back by some (or by none)."""
    metrics, consumed, step = [], {}, 0
    for attempt, (world_size, num_steps, back) in enumerate(attempts, start=1):
        consumed[attempt] = []
        for done in range(step + 1, step + num_steps + 1):
            metrics.append(row(done, attempt))
            for rank in range(world_size):
                ids = rank_slice(
                    sample_ids(seed=1, step=done - 1, global_batch=6, num_samples=50), rank=rank, world_size=world_size
                )
                consumed[attempt].append({"step": done, "ids": ids.tolist()})
        step = max(0, step + num_steps - back)
    samples = count_samples(metrics, consumed, expect)
    assert (samples.lost, samples.repeated) == (0, 0)


def test_what_is_missing_is_lost_and_what_is_too_much_is_repeated():
    metrics = [row(1, 1), row(2, 1), row(4, 1)]
    good = [{"step": step, "ids": expect(step)} for step in (1, 2, 4)]
    assert count_samples(metrics, {1: good}, expect).lost == GLOBAL_BATCH  # step 3
    twice = [*good, {"step": 2, "ids": expect(2)[:2]}]
    assert count_samples(metrics, {1: twice}, expect).repeated == 2
    others = [{"step": 1, "ids": expect(3)}, *good[1:]]
    wrong = count_samples(metrics, {1: others}, expect)
    assert (wrong.lost, wrong.repeated) == (2 * GLOBAL_BATCH, GLOBAL_BATCH)


def test_samples_of_a_step_that_was_done_again_count_once():
    metrics = [row(1, 1), row(2, 1), row(2, 2)]
    consumed = {1: [{"step": s, "ids": expect(s)} for s in (1, 2, 3)], 2: [{"step": 2, "ids": expect(2)}]}
    samples = count_samples(metrics, consumed, expect)
    assert (samples.lost, samples.repeated) == (0, 0)


def test_a_step_that_was_not_applied_has_no_samples():
    metrics = [row(1, 1), row(2, 1, bad_step="spike"), row(3, 1)]
    applied = [{"step": step, "ids": expect(step)} for step in (1, 3)]
    samples = count_samples(metrics, {1: applied}, expect)
    assert (samples.lost, samples.repeated) == (0, 0)
    assert count_samples(metrics, {1: [*applied, {"step": 2, "ids": expect(2)}]}, expect).repeated == GLOBAL_BATCH


def test_goodput_is_the_time_of_steps_that_count():
    """Steps of 1 s end at 1, 2, 3; 4 s of outage; steps 3 and 4 end at 7 and 8.5, the last after a save of 0.5 s."""
    ends = [(1, 1, 1.0), (2, 1, 2.0), (3, 1, 3.0), (3, 2, 7.0), (4, 2, 8.5)]
    metrics = [row(step, attempt, step_s=1.0, time_utc=format_utc(end)) for step, attempt, end in ends]
    attempts = [{"end": "lost"}, {"end": "finished"}]
    ledger = [
        tile("a", -2, 0, "load"),  # before the first step: not counted
        tile("a", 0, 3, "train"),
        tile("a", 3, 6, "reconfigure"),
        tile("a", 6, 10, "train"),  # 2.5 s of it until the last step
        tile("b", 0.5, 8.5, "wait"),
    ]
    goodput = measure_goodput(metrics, attempts, ledger, save_every_steps=5)
    assert goodput.paid == pytest.approx(5.5 / 16.5, abs=1e-4)
    assert goodput.measured == pytest.approx(4 / 8.5, abs=1e-4)
    assert (goodput.num_losses, goodput.num_outages, goodput.outage_s) == (1, 1, 4.0)
    assert (goodput.save_s, goodput.interval_s, goodput.wall_s) == (0.5, 5.5, 8.5)
    assert goodput.predicted == pytest.approx(1 - 0.5 / 5.5 - 5.5 / 2 / 8.5 - 4 / 8.5, abs=1e-4)
    assert measure_goodput(metrics, attempts, [], save_every_steps=5).paid is None
    assert measure_goodput(metrics[:1], attempts, ledger, save_every_steps=5) is None


def test_the_prediction_is_young_s_expectation():
    """Losses at uniformly random moments of the interval, each costing the work since the last save and the outage."""
    save_s, interval_s, between_s, outage_s, lot = 0.5, 60.0, 3600.0, 20.0, random.Random(1)
    num_losses, wasted_s = 2000, 0.0
    for _ in range(num_losses):
        wasted_s += lot.uniform(0, interval_s) + outage_s
    total_s = num_losses * between_s
    simulated = 1 - save_s / interval_s - wasted_s / total_s
    predicted = predict_goodput(
        save_s=save_s,
        interval_s=interval_s,
        between_losses_s=between_s,
        between_outages_s=between_s,
        outage_s=outage_s,
    )
    assert predicted == pytest.approx(simulated, abs=1e-3)


def test_without_losses_only_saves_cost_and_with_too_many_nothing_is_left():
    calm = {"save_s": 1, "interval_s": 100, "between_losses_s": float("inf"), "between_outages_s": float("inf")}
    assert predict_goodput(**calm, outage_s=0) == pytest.approx(0.99)
    assert predict_goodput(**{**calm, "between_losses_s": 1}, outage_s=0) == 0
