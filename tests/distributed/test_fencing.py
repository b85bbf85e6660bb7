"""Two processes that train one run: one goes on, the other ends with the reason and harms nothing."""

import hashlib
import signal
import time
from pathlib import Path

import pytest

from cluster.cli import main
from elastic.leader import LEASE_S
from elastic.rundir import RunDir, read_rows
from tests.distributed._launch import Ranks

STEPS = 300
CONFIG = f"""
strategy: ddp
device: cpu
model: {{dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 64, vocab_size: 300}}
data: {{seq_len: 32, record_samples: true}}
train: {{steps: {STEPS}, global_batch: 7, micro_batch: 2, eval_samples: 8}}
checkpoint: {{every_steps: 20, keep_last: 99}}
cluster: {{max_workers: 2}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fencing")
    (folder / "config.yaml").write_text(CONFIG)
    assert main(["prepare", "kjv:", "--out", str(folder / "data"), "--vocab-size", "300"]) == 0
    return folder


def launch(folder, run, *overrides, num_ranks=1):
    where = (f"data.path={folder / 'data'}", f"storage={run.root.parent}", f"run={run.root.name}")
    return Ranks(num_ranks, str(folder / "config.yaml"), *where, *overrides)


def look(root: Path) -> dict[str, tuple[int, str]]:
    """Every file below a directory, with the time it was changed and a digest of what is in it."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_command_under_the_same_run_name_ends_with_exit_code_2_and_touches_no_file(folder, num_ranks):
    run = RunDir(folder / f"twice-{num_ranks}")
    with launch(folder, run, "train.steps=100000") as first:
        first.wait_for_step(run, 25)
        first.send(signal.SIGSTOP, 0)  # so that all that changes now is the second one's doing
        before = look(run.root)
        with launch(folder, run, "wandb.mode=offline", num_ranks=num_ranks) as second:
            time.sleep(4)  # it has imported torch, and waits for a sign of life
            after = look(run.root)
            first.send(signal.SIGCONT, 0)
            codes, output = second.wait()
        assert codes[0] == 2, output
        assert all(codes), output
        assert "is led by python -m elastic (process" in output
        assert before == after
        assert not (run.root / "wandb").exists()
        first.wait_for_step(run, run_step(run) + 5)
        first.send(signal.SIGTERM, 0)
        assert first.wait()[0] == [3]
    assert [row["attempt"] for row in read_rows(run.attempts)] == [1]


def run_step(run: RunDir) -> int:
    return list(read_rows(run.metrics))[-1]["step"]


def test_a_trainer_that_is_killed_is_followed_at_once_by_the_same_command_on_its_machine(folder):
    run = RunDir(folder / "killed")
    with launch(folder, run) as first:
        first.wait_for_step(run, 21)
        first.send(signal.SIGKILL, 0)
        first.wait()
    start_s = time.monotonic()
    with launch(folder, run) as second:
        second.wait_for_step(run, 22)
        took_s = time.monotonic() - start_s
        second.send(signal.SIGKILL, 0)
    assert took_s < LEASE_S, "it waited for the lease of a process that it could see was dead"
