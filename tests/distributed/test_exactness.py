"""A run that is killed, warned and resized ends as if nothing had happened: the same losses, weights and samples.

Real processes, real text, the command that users type.
"""

import random
import signal
import sys
from itertools import groupby, pairwise

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.distributed._launch import WAIT_S, Ranks, read_samples, start, wait_until

pytestmark = pytest.mark.timeout(900)  # 19 processes that import torch: 70 s on two free cores, minutes on busy ones

STEPS = 60
CONFIG = """
strategy: fsdp2
device: cpu
precision: fp32
model: {dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 64, vocab_size: 300}
data: {seq_len: 32, record_samples: true}
train: {steps: 60, global_batch: 7, micro_batch: 2, eval_samples: 8}  # 7: neither 2 nor 3 ranks divide it
optim: {lr: 3.0e-3}
checkpoint: {every_steps: 4}
cluster: {max_workers: 3}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bible):
    """A configuration, and the King James Bible as tokens."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data").symlink_to(bible)
    return folder


def launch(folder, run, num_ranks):
    where = (f"data.path={folder / 'data'}", f"storage={run.root.parent}", f"run={run.root.name}")
    return Ranks(num_ranks, str(folder / "config.yaml"), *where)


def end_attempt(folder, run, num_ranks, *, number=signal.SIGKILL, ranks=(0,), steps=(0, 0)):
    """Train to a random step of `steps`, send a signal to some ranks, and return exit codes and output of all."""
    step = random.randint(*steps)
    print(f"{run.root.name}: {number.name} to ranks {ranks} of {num_ranks} at step {step}")
    with launch(folder, run, num_ranks) as attempt:
        attempt.wait_for_step(run, step)
        attempt.send(number, *ranks)
        return attempt.wait()


def finish(folder, run, num_ranks):
    with launch(folder, run, num_ranks) as attempt:
        codes, output = attempt.wait()
    assert codes == [0] * num_ranks, output


@pytest.fixture(scope="module")
def unbroken(folder):
    run = RunDir(folder / "runs" / "unbroken")
    finish(folder, run, 2)
    return run


@pytest.fixture(scope="module")
def broken(folder):
    """Two ranks throughout: one killed, both warned, both killed, finished."""
    run = RunDir(folder / "runs" / "broken")
    codes = [
        end_attempt(folder, run, 2, ranks=(1,), steps=(6, 12))[0],
        end_attempt(folder, run, 2, ranks=(1,), steps=(18, 24), number=signal.SIGTERM)[0],
        end_attempt(folder, run, 2, ranks=(0, 1), steps=(30, 36))[0],
    ]
    closed = [row["attempt"] for row in read_rows(run.attempts)]
    finish(folder, run, 2)
    return run, codes, closed


@pytest.fixture(scope="module")
def resized(folder):
    """1 -> 3 -> 2 -> 1 ranks: warned, rank 0 killed, all killed, finished."""
    run = RunDir(folder / "runs" / "resized")
    codes = [
        end_attempt(folder, run, 1, steps=(6, 12), number=signal.SIGTERM)[0],
        end_attempt(folder, run, 3, steps=(18, 24))[0],
        end_attempt(folder, run, 2, ranks=(0, 1), steps=(30, 36))[0],
    ]
    finish(folder, run, 1)
    return run, codes


def read_losses(run):
    return {row["step"]: (row["loss"], row["grad_norm"], row["tokens"]) for row in final_rows(read_rows(run.metrics))}


def load_final_state(run):
    """Return every tensor of the last checkpoint, whole: weights, moments and step counts."""
    storage = open_storage(run.root)
    checkpoint = list_committed(storage)[-1]
    assert checkpoint.step == STEPS
    tensors = read_manifest(storage, checkpoint).tensors
    state = {name: torch.full(record.shape, torch.nan) for name, record in tensors.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(run.root / checkpoint.directory)))  # torch's, not ours
    return state


def test_the_unbroken_run_learns(unbroken):
    losses = read_losses(unbroken)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS][0] < 0.8 * losses[1][0], "else equal losses would prove nothing"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads the whole checkpoint
def test_three_interruptions_do_not_change_a_bit_of_the_losses_and_of_the_final_state(unbroken, broken):
    assert read_losses(broken[0]) == read_losses(unbroken)
    state, expected = load_final_state(broken[0]), load_final_state(unbroken)
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_across_world_sizes_the_losses_agree_at_every_step(unbroken, resized):
    losses, others = read_losses(unbroken), read_losses(resized[0])
    assert others.keys() == losses.keys()
    for step, (loss, _, tokens) in losses.items():
        assert others[step][0] == pytest.approx(loss, rel=1e-5), step
        assert others[step][2] == tokens
    sizes = [size for size, _ in groupby(row["world_size"] for row in final_rows(read_rows(resized[0].metrics)))]
    assert sizes == [1, 3, 2, 1]


def test_every_applied_step_consumes_the_same_samples_whatever_happens(unbroken, broken, resized):
    expected = read_samples(unbroken)
    assert [len(ids) for ids in expected.values()] == [7] * STEPS
    assert len({i for ids in expected.values() for i in ids}) == 7 * STEPS, "within an epoch no sample comes twice"
    for run in (broken[0], resized[0]):
        assert read_samples(run) == expected


def test_a_notice_costs_no_step_and_all_ranks_leave_at_one(broken):
    run, codes, _ = broken
    assert codes[1] == [3, 3]
    _, warned, after, _ = read_rows(run.attempts)
    assert (warned["end"], warned["reason"]) == ("interrupted", "a peer leaves"), "rank 1 was warned, rank 0 tells"
    assert (after["lost_steps"], after["first_step"]) == (0, warned["last_step"] + 1)
    last = [list(read_rows(run.samples(attempt=2, rank=rank)))[-1]["step"] for rank in (0, 1)]
    assert last == [warned["last_step"]] * 2


def test_a_single_process_leaves_on_a_notice_without_losing_a_step(resized):
    run, codes = resized
    assert codes[0] == [3]
    warned, after, *_ = read_rows(run.attempts)
    assert (warned["end"], warned["world_size"]) == ("interrupted", 1)
    assert (after["lost_steps"], after["first_step"], after["world_size"]) == (0, warned["last_step"] + 1, 3)


def test_survivors_of_a_killed_rank_leave_resumable(broken, resized):
    assert broken[1][0] == [3, -9]
    assert resized[1][1] == [-9, 3, 3], "also when rank 0 is the one"


def test_attempts_tell_every_end_and_every_step_done_again(broken, resized):
    run, codes, closed = broken
    assert codes[2] == [-9, -9]
    assert closed == [1, 2], "nobody was left to write the third row"
    assert [row["end"] for row in read_rows(run.attempts)] == ["lost", "interrupted", "lost", "finished"]
    assert [row["end"] for row in read_rows(resized[0].attempts)] == ["interrupted", "lost", "lost", "finished"]
    for one in (run, resized[0]):
        attempts, rows = list(read_rows(one.attempts)), list(read_rows(one.metrics))
        assert [row["attempt"] for row in attempts] == [1, 2, 3, 4]
        assert (attempts[0]["resumed_from"], attempts[3]["resumed_from"]) == ("scratch", "disk")
        for before, after in pairwise(attempts):
            assert after["lost_steps"] == before["last_step"] - after["first_step"] + 1
            assert after["outage_s"] > 0
        assert sum(row["lost_steps"] for row in attempts) == len(rows) - STEPS


def test_torchrun_trains_the_demo_and_a_sigterm_to_it_costs_no_step(folder):
    run = RunDir(folder / "runs" / "demo")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "elastic"]
    command += ["configs/demo.yaml", "run=demo", f"storage={folder / 'runs'}", f"data.path={folder / 'data'}"]
    command += ["train.steps=8", "train.global_batch=3", "train.eval_samples=4", "optim.warmup_tokens=0"]
    command += ["wandb.mode=disabled"]
    torchrun = start(command)
    try:
        wait_until(lambda: len(list(read_rows(run.metrics))) >= 2, [torchrun])
        torchrun.terminate()
        torchrun.communicate(timeout=WAIT_S)
        again = start(command)
        output, _ = again.communicate(timeout=WAIT_S)
    finally:
        torchrun.kill()
    assert again.returncode == 0, output
    warned, resumed = read_rows(run.attempts)
    assert (warned["end"], warned["reason"], warned["world_size"]) == ("interrupted", "SIGTERM", 2)
    assert (resumed["end"], resumed["lost_steps"], resumed["last_step"]) == ("finished", 0, 8)
