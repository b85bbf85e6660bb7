"""A step whose data is poisoned leaves no trace in a run but its rows: real data, the real loop, 1 and 3 ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from elastic.__main__ import main
from elastic.data.corpus import open_corpus
from elastic.data.loader import Loader, eval_batches
from elastic.data.order import sample_ids
from elastic.data.prepared.format import read_info, write_info, write_shard
from elastic.errors import StepError
from elastic.optim.lr_schedule import learning_rate
from elastic.ports import Finished, Interrupted, Notice
from elastic.records.rundir import RunDir, read_rows
from elastic.training.step import build_trainable, eval_loss, train_step
from tests.distributed._loops import BATCH, SEQ_LEN, Watcher, make_config, train_rank, write_data
from tests.distributed._ranks import in_world, run_ranks

STEPS = 44
POISONED = (30, 38)
"""Steps, counted from 1, of which every sample is noise."""


def poisoned_config(folder, run, **fault):
    # 30 steps are few to learn and be sure in
    return make_config(folder, run, steps=STEPS, spike_threshold=4.0, **fault)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in which each token decides the next, with noise in the samples of the poisoned steps."""
    folder = tmp_path_factory.mktemp("poisoned")
    write_data(folder)
    num_samples = STEPS * BATCH + 10
    tokens = (np.arange(num_samples * SEQ_LEN + 1) % 50).astype(np.uint16)
    noise = np.random.default_rng(0)
    for step in POISONED:
        ids = sample_ids(seed=0, step=step - 1, global_batch=BATCH, num_samples=num_samples)
        for sample in ids:
            tokens[sample * SEQ_LEN : (sample + 1) * SEQ_LEN] = noise.integers(0, 300, SEQ_LEN)
    info = read_info(folder / "data")
    ends = np.array([0, len(tokens)], np.int32)
    shard = write_shard(folder / "data" / info.train.shards[0].file, tokens, ends)
    split = replace(info.train, num_tokens=len(tokens), num_documents=1, shards=(shard,))
    write_info(folder / "data", replace(info, train=split))
    return folder


class LeaveAfter:
    """Gives notice once a step is done."""

    def __init__(self, step, watcher):
        self._step, self._rows = step, watcher.rows

    def get_notice(self):
        return Notice(source="test") if self._rows and self._rows[-1]["step"] >= self._step else None


def _train_without_the_poisoned_steps(config, world):
    """The same run as plain code that never computes these steps."""
    trainable, corpus, tokens, rows = build_trainable(config, world), open_corpus(config), 0, []
    place = {"rank": world.rank, "world_size": world.world_size, "device": world.device}
    with Loader(corpus, start_step=0, **place) as loader:
        for step, batch in loader:
            if step + 1 in POISONED:
                continue
            lr = learning_rate(config.optim, tokens + BATCH * SEQ_LEN, config.total_tokens)
            result = train_step(trainable, batch.microbatches, lr=lr, max_grad_norm=1.0, world=world)
            tokens += result.target_tokens
            rows.append((step + 1, tokens, lr, result.loss, result.grad_norm))
    batches = [m for b in eval_batches(corpus, **place) for m in b.microbatches]
    return rows, eval_loss(trainable, batches, world)


def _everything(rank, port, folder):
    results = {}
    for attempt, size in enumerate((1, 3), start=1):
        whole = train_rank(poisoned_config(folder, f"whole-{size}"), rank, port, world_size=size, attempt=2 * attempt)
        reference = in_world(
            lambda world: _train_without_the_poisoned_steps(poisoned_config(folder, "reference"), world),
            rank,
            port,
            world_size=size,
            attempt=2 * attempt + 1,
        )
        results[size] = (whole, reference)
    watcher = Watcher()
    resumed = poisoned_config(folder, "resumed")
    results["resumed"] = [
        train_rank(
            resumed,
            rank,
            port,
            world_size=3,
            attempt=11,
            watcher=watcher,
            notices=LeaveAfter(35, watcher),
        ),
        train_rank(resumed, rank, port, world_size=1, attempt=12),
    ]
    with pytest.raises(StepError) as failure:
        train_rank(poisoned_config(folder, "limited", max_bad_steps=2), rank, port, world_size=3, attempt=13)
    results["limited"] = str(failure.value)
    return results


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(_everything, 3, folder)


@pytest.mark.parametrize("size", [1, 3])
def test_weights_moments_and_schedule_go_on_as_if_the_step_had_never_been(ranks, size):
    (outcome, rows), (expected, val_loss) = ranks[0][size]
    assert isinstance(outcome, Finished)
    good = [row for row in rows if row["step"] not in POISONED]
    # equal to the last bit, for 14 steps: a changed weight, moment or learning rate would show in each later loss
    assert [(r["step"], r["tokens"], r["lr"], r["loss"], r["grad_norm"]) for r in good] == expected
    assert rows[-1]["val_loss"] == val_loss


@pytest.mark.parametrize("size", [1, 3])
def test_bad_steps_are_told_with_the_samples_of_all_ranks(ranks, folder, size):
    run = RunDir(folder / "runs" / f"whole-{size}")
    rows = {row["step"]: row for row in ranks[0][size][0][1]}
    assert {step: row.get("bad_step") for step, row in rows.items() if "bad_step" in row} == dict.fromkeys(
        POISONED, "spike"
    )
    bad = list(read_rows(run.bad_steps))
    assert [row["step"] for row in bad] == list(POISONED)
    for row in bad:
        ids = sample_ids(seed=0, step=row["step"] - 1, global_batch=BATCH, num_samples=STEPS * BATCH + 10)
        assert row["sample_ids"] == ids.tolist()
        assert row["loss"] == rows[row["step"]]["loss"] > row["limit"]
    trained = {row["step"] for row in read_rows(run.samples(attempt=2 if size == 1 else 4, rank=0))}
    assert trained == set(range(1, STEPS + 1)) - set(POISONED)


def test_a_resumed_run_judges_as_an_unbroken_one(ranks):
    (first, before), (second, after) = ranks[0]["resumed"]
    assert isinstance(first, Interrupted)
    assert isinstance(second, Finished)
    rows = [*before, *after]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # the second attempt has seen 3 losses of its own when the noise comes; alone it could not tell
    assert [row["step"] for row in rows if "bad_step" in row] == list(POISONED)
    expected = [row["loss"] for row in ranks[0][3][0][1]]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_all_ranks_end_with_the_reason_once_the_limit_is_reached(ranks):
    assert {rank["limited"] for rank in ranks} == {ranks[0]["limited"]}
    assert "steps 30, 38 of the last 100" in ranks[0]["limited"]
    assert "fault.max_bad_steps=2" in ranks[0]["limited"]


def _diverge(rank, port, folder):
    config = folder / "config.json"
    config.write_text(json.dumps({"device": "cpu", "model": {"dim": 32, "num_heads": 2, "num_kv_heads": 1}}))
    overrides = ["model.vocab_size=300", "wandb.mode=disabled", f"data.seq_len={SEQ_LEN}", "optim.lr=1e30"]
    return main([str(config), f"data.path={folder / 'data'}", f"storage={folder / 'runs'}", *overrides])


def test_a_learning_rate_that_destroys_the_weights_ends_the_run_with_exit_code_1(folder):
    assert run_ranks(_diverge, 1, folder) == [1]
    run = RunDir(folder / "runs" / "run")
    rows = list(read_rows(run.metrics))
    assert [row.get("bad_step") for row in rows] == [None, *["not_finite"] * 5]
    assert rows[-1]["tokens"] == rows[0]["tokens"], "what was not applied moves no schedule"
    (attempt,) = read_rows(run.attempts)
    assert attempt["end"] == "failed"
    assert "steps 2, 3, 4, 5, 6" in attempt["reason"]
