"""Ranks that hang for real: one is stopped, one is stuck in its storage. All end resumable, soon, and say where."""

import os
import signal
import time

import pytest

from elastic.records.rundir import RunDir, read_rows
from tests.distributed._launch import Ranks
from tests.distributed._loops import SEQ_LEN, write_data

pytestmark = pytest.mark.timeout(600)

PATIENCE_S = 4.0
CONFIG = f"""
device: cpu
model: {{dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 64, vocab_size: 300}}
data: {{seq_len: {SEQ_LEN}, record_samples: true}}
train: {{steps: 30, global_batch: 7, micro_batch: 2, eval_samples: 8}}
checkpoint: {{every_steps: 5}}
cluster: {{max_workers: 2}}
fault: {{hang_step_s: 2.0, hang_data_s: {PATIENCE_S}}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hangs")
    (folder / "config.yaml").write_text(CONFIG)
    write_data(folder)
    return folder


def launch(folder, run, num_ranks, *overrides):
    where = (f"data.path={folder / 'data'}", f"storage={run.root.parent}", f"run={run.root.name}")
    return Ranks(num_ranks, str(folder / "config.yaml"), *where, *overrides)


def test_a_stopped_peer_ends_the_others_long_before_the_collective_times_out(folder):
    run = RunDir(folder / "runs" / "stopped")
    with launch(folder, run, 2, "train.steps=100000") as attempt:
        attempt.wait_for_step(run, 8)
        attempt.send(signal.SIGSTOP, 1)
        start_s = time.monotonic()
        code, output = attempt.wait_for(0)
        waited_s = time.monotonic() - start_s
        attempt.send(signal.SIGCONT, 1)
        codes, rest = attempt.wait()
    print(output[-3000:], f"\nrank 0 gave up after {waited_s:.1f} s; the collective time-out is 120 s")
    assert (code, codes[1]) == (3, 3), output + rest
    assert waited_s < 10 * PATIENCE_S
    assert "no progress after step" in output
    assert "the stacks of all threads" in output
    assert "in run_loop" in output
    (row,) = read_rows(run.attempts)
    assert (row["end"], row["reason"].split(" for ")[0]) == ("lost", f"no progress after step {row['last_step']}")


def test_a_rank_stuck_in_its_storage_says_so_and_the_run_resumes_once_that_works(folder):
    run = RunDir(folder / "runs" / "stuck")
    run.root.mkdir(parents=True)
    os.mkfifo(run.samples(attempt=1, rank=0))  # nobody reads it, so opening it never returns
    with launch(folder, run, 1) as attempt:
        codes, output = attempt.wait()
    assert codes == [3], output
    assert "rank 0: no progress after step 1 for" in output
    assert "writing its rows; run the same command to resume" in output
    assert "in append_row" in output
    with launch(folder, run, 1) as attempt:
        codes, output = attempt.wait()
    assert codes == [0], output
    assert [row["end"] for row in read_rows(run.attempts)] == ["lost", "finished"]
