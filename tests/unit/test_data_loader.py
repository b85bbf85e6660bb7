import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic.config import ClusterConfig, DataConfig, RunConfig, TrainConfig
from elastic.data.corpus import Corpus
from elastic.data.loader import Loader, eval_batches
from elastic.data.order import sample_ids
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.shards import Dataset, open_dataset
from elastic.errors import DataError
from elastic.nn.loss import IGNORE

SEQ_LEN = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"Line {i} of a text, {i * i} in its square."}) for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "out", vocab_size=300, val_fraction=0.2)
    return open_dataset(folder / "out")


def make_config(*, steps=3, global_batch=12, micro_batch=4, eval_samples=20, prefetch_steps=2):
    return RunConfig(
        data=DataConfig(seq_len=SEQ_LEN, prefetch_steps=prefetch_steps),
        train=TrainConfig(
            steps=steps, global_batch=global_batch, micro_batch=micro_batch, eval_samples=eval_samples, seed=5
        ),
        cluster=ClusterConfig(),
    )


def load(dataset, config, *, rank=0, world_size=1, start_step=0):
    with Loader(
        Corpus({"": dataset}, config), rank=rank, world_size=world_size, device=CPU, start_step=start_step
    ) as loader:
        return list(loader)


def real_rows(batch):
    rows = [
        (*tokens.tolist(), labels[-1].item())
        for tokens_BS, labels_BS in batch.microbatches
        for tokens, labels in zip(tokens_BS, labels_BS, strict=True)
        if (labels != IGNORE).any()
    ]
    for tokens_BS, labels_BS in batch.microbatches:  # a label is the next token, or everywhere IGNORE
        real = (labels_BS != IGNORE).all(dim=1)
        assert torch.equal(labels_BS[real][:, :-1], tokens_BS[real][:, 1:])
        assert (labels_BS[~real] == IGNORE).all()
    return rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(world_size=st.integers(1, 9), global_batch=st.integers(9, 21), micro_batch=st.integers(1, 12))
def test_ranks_of_any_world_see_the_global_batch_once_in_equal_shapes(dataset, world_size, global_batch, micro_batch):
    config = make_config(steps=2, global_batch=global_batch, micro_batch=micro_batch)
    ranks = [load(dataset, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    per_rank = math.ceil(global_batch / world_size)
    rows = min(micro_batch, per_rank)
    for step in range(2):
        batches = [batch for rank in ranks for s, batch in rank if s == step]
        ids = [i for batch in batches for i in batch.sample_ids]
        num_samples = dataset.num_samples("train", SEQ_LEN)
        assert ids == sample_ids(seed=5, step=step, global_batch=global_batch, num_samples=num_samples).tolist()
        assert [row for batch in batches for row in real_rows(batch)] == [
            tuple(dataset.read("train", i, SEQ_LEN).tolist()) for i in ids
        ]
        for batch in batches:
            assert len(batch.microbatches) == math.ceil(per_rank / rows)
            assert {t.shape for pair in batch.microbatches for t in pair} == {(rows, SEQ_LEN)}
            assert {t.dtype for pair in batch.microbatches for t in pair} == {torch.int64}


def test_a_resumed_loader_goes_on_where_the_first_would_have(dataset):
    whole = [(step, batch.sample_ids) for step, batch in load(dataset, make_config(steps=6))]
    late = [(step, batch.sample_ids) for step, batch in load(dataset, make_config(steps=6), start_step=4)]
    assert [step for step, _ in whole] == [0, 1, 2, 3, 4, 5]
    assert late == whole[4:]
    assert load(dataset, make_config(steps=6), start_step=6) == []


class Broken(Dataset):
    def read(self, split, sample_id, seq_len):
        if split == "train" and sample_id in self.bad_ids:
            raise OSError("the disk is gone")
        return super().read(split, sample_id, seq_len)


def test_an_error_of_the_thread_is_raised_at_its_step_and_ends_the_thread(dataset):
    config = make_config(steps=5)
    broken = Broken(dataset.folder, dataset.info)
    broken.bad_ids = {load(dataset, config)[1][1].sample_ids[0]}
    steps = []
    with (
        pytest.raises(OSError, match="the disk is gone"),
        Loader(Corpus({"": broken}, config), rank=0, world_size=1, device=CPU, start_step=0) as loader,
    ):
        steps.extend(step for step, _ in loader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_leaving_the_block_early_ends_the_thread_without_reading_the_rest(dataset):
    class Counting(Dataset):
        num_reads = 0

        def read(self, split, sample_id, seq_len):
            self.num_reads += 1
            return super().read(split, sample_id, seq_len)

    counting = Counting(dataset.folder, dataset.info)
    config = make_config(steps=1000, prefetch_steps=3)
    with Loader(Corpus({"": counting}, config), rank=0, world_size=1, device=CPU, start_step=0) as loader:
        next(loader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert counting.num_reads <= 12 * (1 + 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("eval_samples", [1, 5, 20, 10_000])
def test_evaluation_sees_the_first_samples_once_whatever_the_world(dataset, world_size, eval_samples):
    config = make_config(eval_samples=eval_samples)
    ranks = [
        list(eval_batches(Corpus({"": dataset}, config), rank=rank, world_size=world_size, device=CPU))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    num_samples = min(eval_samples, dataset.num_samples("val", SEQ_LEN))
    batches = [batch for batches in ranks for batch in batches]
    assert sorted(i for batch in batches for i in batch.sample_ids) == list(range(num_samples))
    rows = min(4, math.ceil(12 / world_size))
    assert {t.shape for batch in batches for pair in batch.microbatches for t in pair} == {(rows, SEQ_LEN)}
    expected = sorted(tuple(dataset.read("val", i, SEQ_LEN).tolist()) for i in range(num_samples))
    assert sorted(row for batch in batches for row in real_rows(batch)) == expected


def test_an_empty_validation_is_refused_at_the_call_and_not_at_the_first_batch(dataset):
    config = replace(make_config(), data=DataConfig(seq_len=dataset.info.val.num_tokens))
    with pytest.raises(DataError, match="val split"):
        eval_batches(Corpus({"": dataset}, config), rank=0, world_size=1, device=CPU)


def test_training_data_shorter_than_a_sequence_is_refused(dataset):
    config = replace(make_config(), data=DataConfig(seq_len=dataset.info.train.num_tokens))
    with pytest.raises(DataError, match="train split"):
        load(dataset, config)
