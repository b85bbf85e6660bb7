import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.order import rank_slice, sample_ids

sizes = st.integers(1, 700)
seeds = st.integers(-(2**63), 2**63 - 1)


def epoch_ids(seed, epoch, num_samples):
    return sample_ids(seed=seed, step=epoch, global_batch=num_samples, num_samples=num_samples)


@given(seed=seeds, epoch=st.integers(0, 1000), num_samples=sizes)
def test_every_epoch_sees_every_sample_exactly_once(seed, epoch, num_samples):
    assert sorted(epoch_ids(seed, epoch, num_samples)) == list(range(num_samples))


@given(seed=seeds, num_samples=sizes, global_batch=st.integers(1, 300), steps=st.integers(1, 8))
def test_the_sequence_does_not_depend_on_how_it_is_cut_into_steps(seed, num_samples, global_batch, steps):
    cut = [sample_ids(seed=seed, step=s, global_batch=global_batch, num_samples=num_samples) for s in range(steps)]
    whole = sample_ids(seed=seed, step=0, global_batch=global_batch * steps, num_samples=num_samples)
    np.testing.assert_array_equal(np.concatenate(cut), whole)


@given(seed=seeds, global_batch=st.integers(1, 300), worlds=st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_any_sequence_of_world_sizes_consumes_the_same_samples(seed, global_batch, worlds):
    for step, world_size in enumerate(worlds):
        ids = sample_ids(seed=seed, step=step, global_batch=global_batch, num_samples=1000)
        parts = [rank_slice(ids, rank=rank, world_size=world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), ids)
        assert max(map(len, parts)) == -(-global_batch // world_size)


@given(num_samples=st.integers(2**40, 2**62 - 1), step=st.integers(0, 2**40))
def test_a_huge_space_is_walked_without_leaving_it_or_repeating(num_samples, step):
    ids = sample_ids(seed=1, step=step, global_batch=64, num_samples=num_samples)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert len(set(ids.tolist())) == 64


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(epoch_ids(seed, epoch, 50)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_an_order_is_as_mixed_as_a_random_one():
    # A random permutation has on average 1 fixed point and 1 pair of neighbours that stay neighbours, both with
    # variance 1. Over 400 epochs the mean of each has a standard deviation of 1/20; five of them are allowed.
    orders = [epoch_ids(7, epoch, 97) for epoch in range(400)]
    fixed = np.mean([(ids == np.arange(97)).sum() for ids in orders])
    neighbours = np.mean([(np.diff(ids) == 1).sum() for ids in orders])
    assert abs(fixed - 1) < 0.25
    assert abs(neighbours - 1) < 0.25
    # every sample is equally likely at every place: chi-squared of 97 cells has mean 96 and standard deviation 14
    for place in (0, 48, 96):
        counts = np.bincount([ids[place] for ids in orders], minlength=97)
        assert ((counts - 400 / 97) ** 2 / (400 / 97)).sum() < 96 + 5 * 14


@pytest.mark.parametrize(
    ("kwargs", "golden"),
    [
        ({"seed": 0, "step": 0, "global_batch": 8, "num_samples": 10}, [6, 1, 5, 8, 9, 2, 0, 7]),
        ({"seed": 1, "step": 3, "global_batch": 8, "num_samples": 1000}, [410, 838, 563, 932, 136, 141, 815, 99]),
        (
            {"seed": -1, "step": 10**6, "global_batch": 4, "num_samples": 10**12},
            [860380520643, 271400251290, 459979695262, 119529085027],
        ),
    ],
)
def test_the_order_is_the_one_that_runs_in_flight_were_started_with(kwargs, golden):
    """If this fails, every run in flight would repeat and skip samples after an update: do not adjust the numbers."""
    assert sample_ids(**kwargs).tolist() == golden
