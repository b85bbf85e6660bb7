"""A mixture from a bad object store, documents packed, through worlds by lot: the samples and losses of one world."""

import json
import os
import random
import signal

import numpy as np
import pytest

from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.distributed._launch import Ranks
from tests.flaky_proxy import open_proxy

CONFIG = """
run: a
device: cpu
model: {dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 64, vocab_size: 300}
data: {seq_len: 128, packing: documents, record_samples: true}
train: {steps: 66, global_batch: 7, micro_batch: 2, eval_samples: 8}
optim: {lr: 3.0e-3}
wandb: {mode: disabled}
"""
WEIGHTS = {"law": 0.6, "poetry": 0.3, "letters": 0.1}
NUM_CHANGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three parts of the Bible with one tokenizer."""
    folder, chapters = tmp_path_factory.mktemp("worlds"), read_chapters()
    (folder / "config.yaml").write_text(CONFIG)
    for name, part in zip(WEIGHTS, (chapters[:180], chapters[480:630], chapters[1050:]), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        own = {} if name == "law" else {"tokenizer": folder / "law" / "tokenizer.json"}
        prepare([folder / f"{name}.jsonl"], folder / name, vocab_size=300, shard_tokens=100_000, **own)
    return folder


def launch(folder, place, storage, *, num_ranks, more=()):
    sources = [f"data.sources.{name}.{key}={value}" for name, weight in WEIGHTS.items()
               for key, value in (("path", f"{place}/{name}"), ("weight", weight))]  # fmt: skip
    phases = ("data.phases.late.from_step=40", "data.phases.late.weights.letters=1", "data.phases.late.weights.law=1")
    return Ranks(num_ranks, str(folder / "config.yaml"), f"storage={storage}", *sources, *phases, *more)


def read_samples(run):
    """Return the ids of each step over all ranks, of the attempt whose row counts."""
    attempts = {row["step"]: row["attempt"] for row in final_rows(read_rows(run.metrics))}
    found = {step: [] for step in attempts}
    for attempt in sorted(set(attempts.values())):
        world_size = next(row["world_size"] for row in read_rows(run.attempts) if row["attempt"] == attempt)
        for rank in range(world_size):
            for row in read_rows(run.samples(attempt=attempt, rank=rank)):
                if attempts[row["step"]] == attempt:
                    found[row["step"]] += row["ids"]
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twelve_worlds_by_lot_train_on_the_samples_of_one(folder, tmp_path, s3_url, monkeypatch, capsys):
    with launch(folder, folder, tmp_path / "unbroken", num_ranks=1) as ranks:
        codes, output = ranks.wait()
    assert codes == [0], output
    store = open_storage(s3_url)
    for name in WEIGHTS:
        for path in (folder / name).iterdir():
            store.write(f"{name}/{path.name}", [path.read_bytes()])
    dice, run = random.Random(), RunDir(tmp_path / "broken" / "a")
    rates = {"throttled": 0.004, "answer lost": 0.003, "hung up": 0.003, "slow": 0.05}
    with open_proxy(os.environ["AWS_ENDPOINT_URL"], rates=rates) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for change in range(NUM_CHANGES + 1):
            cache = (f"data.cache={tmp_path / f'node-{change % 3}'}",)  # some nodes come back, others are new
            size = dice.choice((1, 2, 3))
            with launch(folder, s3_url, tmp_path / "broken", num_ranks=size, more=cache) as ranks:
                if change < NUM_CHANGES:
                    ranks.wait_for_step(run, 5 * change + dice.randrange(1, 5))
                    ranks.send(signal.SIGTERM, dice.randrange(size))
                codes, output = ranks.wait()
            assert codes == [3 if change < NUM_CHANGES else 0] * size, output
    whole, broken = RunDir(tmp_path / "unbroken" / "a"), run
    assert read_samples(broken) == read_samples(whole)
    losses = [[row["loss"] for row in final_rows(read_rows(each.metrics))] for each in (whole, broken)]
    np.testing.assert_allclose(*losses, rtol=2e-4)
    worlds = [row["world_size"] for row in read_rows(broken.attempts)]
    assert len(worlds) == NUM_CHANGES + 1 and len(losses[0]) == 66
    with capsys.disabled():
        worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
        print(f"\nworlds {worlds}; requests {dict(done)}; losses differ by {worst:.1e} at most")
