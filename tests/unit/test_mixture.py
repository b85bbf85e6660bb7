"""How sources share a run: counts in closed form, near the weights at any point, and phases."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import DataConfig, PhaseConfig, RunConfig, SourceConfig, TrainConfig
from elastic.data.corpus import Corpus
from elastic.data.prepared.format import DatasetInfo, SplitInfo
from elastic.data.prepared.shards import Dataset
from elastic.errors import ConfigError
from elastic.mixture import build_mixture, cut_description, share_out

weight_lists = st.lists(st.integers(0, 10**6), min_size=1, max_size=12).filter(any)


def get_bound(num_sources):
    return Fraction(1, 2) * (1 + sum(Fraction(1, n) for n in range(1, num_sources)))


@given(weights=weight_lists, num_samples=st.integers(0, 10**15))
def test_counts_sum_up_and_are_near_the_weights_wherever_one_looks(weights, num_samples):
    counts = share_out(num_samples, weights)
    assert sum(counts) == num_samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(num_samples * weight, sum(weights))) <= get_bound(len(weights))
        assert count == 0 or weight


@given(weights=weight_lists, num_samples=st.integers(0, 10**9), more=st.integers(1, 3))
def test_no_count_falls(weights, num_samples, more):
    before, after = share_out(num_samples, weights), share_out(num_samples + more, weights)
    assert all(0 <= new - old <= more for old, new in zip(before, after, strict=True))


def make_config(weights, *, phases=(), steps=10, global_batch=8, seed=3):
    sources = {name: SourceConfig(path=f"/{name}", weight=weight) for name, weight in weights.items()}
    data = DataConfig(sources=sources, phases={f"p{n}": phase for n, phase in enumerate(phases)}, seq_len=4)
    return RunConfig(data=data, train=TrainConfig(steps=steps, global_batch=global_batch, seed=seed))


def make_corpus(sizes, config):
    """Build a corpus of sources with so many samples; nobody reads them here."""

    def describe(num_samples):
        empty = SplitInfo(num_documents=0, num_tokens=0, shards=())
        train = SplitInfo(num_documents=1, num_tokens=num_samples * config.data.seq_len + 1, shards=())
        return DatasetInfo(
            vocab_size=9,
            eot_id=0,
            tokenizer_sha256="",
            train_entropy_nats=1.0,
            val_cross_entropy_nats=None,
            train=train,
            val=empty,
        )

    return Corpus({name: Dataset(None, describe(size)) for name, size in sizes.items()}, config)


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    global_batch=st.integers(1, 64),
    start=st.integers(0, 10_000),
)
def test_weights_hold_over_ten_thousand_steps_for_any_resume_point(weights, global_batch, start):
    names = [f"s{n}" for n in range(len(weights))]
    config = make_config(dict(zip(names, weights, strict=True)), global_batch=global_batch)
    sizes = {name: 100 + 7 * n for n, name in enumerate(names)}
    corpus = make_corpus(sizes, config)
    taken = corpus.mixture.count(start * global_batch)
    for step in (start, start + 1):
        found = [corpus.train.find(sample_id) for sample_id in corpus.get_ids(step).tolist()]
        taken = [count + sum(name == of for of, _ in found) for name, count in zip(names, taken, strict=True)]
        for count, weight in zip(taken, weights, strict=True):
            exact = Fraction((step + 1) * global_batch * weight, sum(weights))
            assert abs(count - exact) <= get_bound(len(weights))


def test_each_source_is_read_epoch_by_epoch_whatever_the_phases():
    phases = [PhaseConfig(from_step=11, weights={"a": 1, "c": 3}), PhaseConfig(from_tokens=960, weights={"b": 1})]
    config = make_config({"a": 0.7, "b": 0.3, "c": 0}, phases=phases)
    sizes = {"a": 37, "b": 23, "c": 11}
    corpus = make_corpus(sizes, config)
    read = {name: np.zeros(size, int) for name, size in sizes.items()}
    for step in range(60):
        for sample_id in corpus.get_ids(step).tolist():
            name, index = corpus.train.find(sample_id)
            read[name][index] += 1
        assert all(times.max() - times.min() <= 1 for times in read.values())
    assert all(times.min() >= 2 for times in read.values())


def test_weights_change_at_the_tokens_and_steps_that_phases_name():
    # a sample has 4 tokens and a step 8 samples: 960 tokens are 240 samples, or 30 steps
    phases = [PhaseConfig(from_tokens=960, weights={"b": 1}), PhaseConfig(from_step=11, weights={"c": 1})]
    corpus = make_corpus({"a": 9, "b": 9, "c": 9}, make_config({"a": 1, "b": 0, "c": 0}, phases=phases))
    sources = ["".join({corpus.train.find(i)[0] for i in corpus.get_ids(step).tolist()}) for step in range(40)]
    assert "".join(sources) == 10 * "a" + 20 * "c" + 10 * "b"


def test_ranks_have_some_of_each_source_in_every_step():
    corpus = make_corpus({"a": 10_000, "b": 10_000}, make_config({"a": 0.5, "b": 0.5}, global_batch=64))
    halves = [corpus.get_ids(step)[half] < 10_000 for step in range(200) for half in (slice(32), slice(32, None))]
    of_a = np.array([half.sum() for half in halves])
    # 32 of 64 without replacement, 32 of them from a: mean 16, standard deviation 2.02
    assert abs(of_a.mean() - 16) < 1e-9 and 1.6 < of_a.std() < 2.4


def test_the_epochs_of_each_source_are_known_before_the_run():
    config = make_config({"web": 3, "code": 1}, steps=100, phases=[PhaseConfig(from_step=51, weights={"code": 1})])
    plan = make_corpus({"web": 600, "code": 50}, config).plan_epochs()
    # 400 samples at 3 : 1, then 400 of code alone
    assert [(one.name, one.num_taken, one.epochs) for one in plan] == [("web", 300, 0.5), ("code", 500, 10.0)]


def test_a_weight_is_the_number_that_was_written():
    corpus = make_corpus({"a": 9, "b": 9}, make_config({"a": 0.7, "b": 0.1 + 0.2}))
    assert corpus.mixture.count(10**30)[0] == 7 * 10**46 // (10**17 + 4)  # 0.30000000000000004
    assert build_mixture(make_config({"a": 0.7, "b": 0.3})).count(10**30) == (7 * 10**29, 3 * 10**29)


def test_a_later_phase_changes_nothing_of_what_was_before_it():
    config = make_config({"a": 0.7, "b": 0.3})
    later = make_config({"a": 0.7, "b": 0.3, "c": 0}, phases=[PhaseConfig(from_step=6, weights={"c": 1})])
    before, after = build_mixture(config).describe(), build_mixture(later).describe()
    assert cut_description(before, 40) == cut_description(after, 40)
    assert cut_description(before, 41) != cut_description(after, 41)
    old, new = make_corpus({"a": 50, "b": 60}, config), make_corpus({"a": 50, "b": 60, "c": 70}, later)
    assert [old.get_ids(step).tolist() for step in range(5)] == [new.get_ids(step).tolist() for step in range(5)]


def test_the_order_of_a_mixture_is_the_one_that_runs_in_flight_were_started_with():
    """If this fails, every run in flight would repeat and skip samples after an update: do not adjust the numbers."""
    corpus = make_corpus({"web": 1000, "code": 100}, make_config({"web": 0.7, "code": 0.3}))
    assert [corpus.get_ids(step).tolist() for step in (0, 12345)] == [
        [518, 77, 1065, 249, 123, 530, 753, 1040],
        [1031, 1058, 269, 903, 422, 936, 918, 469],
    ]


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (PhaseConfig(weights={"a": 1}), "one of them must be more than 0"),
        (PhaseConfig(from_step=3, from_tokens=3, weights={"a": 1}), "one of them must be more than 0"),
        (PhaseConfig(from_step=3, weights={"d": 1}), "names d, which data.sources does not. Use a, b"),
        (PhaseConfig(from_step=3, weights={"a": 0}), "no source has a weight"),
        (PhaseConfig(from_step=3, weights={"a": -1, "b": 2}), "negative or not finite"),
    ],
)
def test_a_phase_that_cannot_be_meant_is_refused(phase, told):
    with pytest.raises(ConfigError, match=r"data\.phases\.p0") as caught:
        make_config({"a": 1, "b": 1}, phases=[phase])
    assert told in str(caught.value)
