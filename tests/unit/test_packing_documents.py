"""Rows of whole documents: each token once, nothing across a border, little padding."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.data import packing
from elastic.data.corpus import Corpus, open_corpus
from elastic.data.loader import Loader, join_borders
from elastic.data.packing import PackedSamples, count_rows, pack, parse_index
from elastic.data.preparation.prepare import prepare
from elastic.nn.loss import IGNORE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents from one word to many, over shards that end within them."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{n} " + "sheep went over the hill, " * (n * n % 23) for n in range(150)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "a.jsonl"], folder / "out", vocab_size=300, val_fraction=0.1, shard_tokens=500)
    return folder / "out"


def make_config(data, seq_len, **train):
    return RunConfig(data=DataConfig(path=str(data), seq_len=seq_len, packing="documents"), train=TrainConfig(**train))


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_what_is_packed_is_all_there_and_fits(lengths):
    rows = pack(np.array(lengths), 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert count_rows(np.array(lengths), 64) == len(rows)
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(rows) == 1 or sizes[0] + sizes[1] > 64  # no two rows would fit into one


@settings(deadline=None, max_examples=15)
@given(seq_len=st.integers(2, 300), window_rows=st.sampled_from([1, 3, 128]))
def test_each_token_that_follows_another_in_a_document_is_a_label_once(data, seq_len, window_rows):
    dataset = open_corpus(make_config(data, 8)).sources[""]
    info = dataset.info.train
    before, packing.WINDOW_ROWS = packing.WINDOW_ROWS, window_rows
    try:
        samples = PackedSamples(dataset, "train", seq_len)
        rows = [samples.read(index) for index in range(len(samples))]
    finally:
        packing.WINDOW_ROWS = before
    stream = dataset.read_tokens("train", 0, info.num_tokens)
    first = dataset.find_documents("train", 0, info.num_tokens)
    assert len(first) == info.num_documents
    seen = np.zeros(info.num_tokens, int)
    for row in rows:
        for piece, start in zip(row.pieces, row.starts, strict=False):
            inside = slice(start, start + piece.num_targets)
            label_at = np.arange(piece.position + 1, piece.position + piece.num_targets + 1)
            np.testing.assert_array_equal(row.tokens[inside], stream[label_at - 1])
            np.testing.assert_array_equal(row.labels[inside], stream[label_at])
            assert row.counted[inside].all()
            seen[label_at] += 1
        assert row.counted.sum() == sum(piece.num_targets for piece in row.pieces)
        assert row.starts[0] == 0 and (np.diff(row.starts) > 0).all()
    expected = np.ones(info.num_tokens, int)
    expected[first] = 0
    np.testing.assert_array_equal(seen, expected)
    assert samples.padding_share == pytest.approx(1 - expected.sum() / (len(rows) * seq_len))


def test_padding_is_little_and_its_share_is_told(data):
    corpus = open_corpus(make_config(data, 256))
    (epochs,) = corpus.plan_epochs()
    assert 0 < epochs.padding_share < 0.03
    assert corpus.target_share == pytest.approx(1 - epochs.padding_share)


def test_an_index_is_the_same_after_it_was_kept(data):
    samples = open_corpus(make_config(data, 50)).train.sources[0]
    again = parse_index(samples.get_index().dump())
    np.testing.assert_array_equal(again.ends, samples.get_index().ends)
    assert again.num_targets == samples.get_index().num_targets


def test_the_rows_are_those_that_runs_in_flight_were_started_with():
    """If this fails, every run in flight would repeat and skip samples after an update: do not adjust the numbers."""
    lengths = np.array([5, 9, 3, 7, 2, 8, 4, 6, 1, 9, 3])
    assert packing.WINDOW_ROWS == 128
    assert pack(lengths, 10) == [[1], [8, 9], [5], [2, 3], [6, 7], [0, 4, 10]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_of_any_world_see_the_rows_of_a_step_with_their_borders(data, world_size):
    corpus = Corpus(
        open_corpus(make_config(data, 40)).sources, make_config(data, 40, steps=2, global_batch=7, micro_batch=3)
    )
    for step in range(2):
        expected = [corpus.train.read(sample_id) for sample_id in corpus.get_ids(step).tolist()]
        found = []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "device": CPU}
            with Loader(corpus, **place, start_step=step) as loader:
                _, batch = next(loader)
            for tokens_BS, labels_BS, borders_N in batch.microbatches:
                assert borders_N[-1] == tokens_BS.numel()
                for row, (tokens, labels) in enumerate(zip(tokens_BS, labels_BS, strict=True)):
                    starts = borders_N - row * 40
                    starts = starts[(starts >= 0) & (starts < 40)]
                    if (labels != IGNORE).any():
                        found.append((tokens.tolist(), labels.tolist(), starts.tolist()))
                    else:
                        assert starts.tolist() == [0]
        assert found == [
            (row.tokens.tolist(), np.where(row.counted, row.labels, IGNORE).tolist(), row.starts.tolist())
            for row in expected
        ]


def test_there_are_few_different_numbers_of_borders():
    starts = [np.arange(n, dtype=np.int32) for n in (1, 3, 2, 9)]
    borders = join_borders(starts, 2, 10)
    assert borders.tolist() == [[0, 10, 11, 12] + [20] * 12, [0, 1, 10, *range(11, 19)] + [20] * 5]
