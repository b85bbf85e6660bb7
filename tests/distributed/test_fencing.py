"""Two processes that train one run: one goes on, the other ends with the reason and harms nothing."""

import hashlib
import re
import signal
import time
from pathlib import Path

import pytest

from elastic.records.attempts import final_rows
from elastic.records.fencing import get_newest_generation
from elastic.records.leader import LEASE_S
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from elastic.storage.faulty import FAULTS_VARIABLE, Fault, write_fault
from tests.distributed._launch import Ranks, read_samples, wait_until

STEPS = 40
TEMPORARY = re.compile(r"/\..*\.tmp$")
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
def folder(tmp_path_factory, bible):
    folder = tmp_path_factory.mktemp("fencing")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data").symlink_to(bible)
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


def is_committed(run: RunDir, step: int) -> bool:
    return (run.checkpoints / f"step-{step:08d}" / "COMMITTED").exists()


def run_step(run: RunDir) -> int:
    return list(read_rows(run.metrics))[-1]["step"]


def test_a_trainer_that_was_frozen_in_its_last_save_and_comes_back_after_another_took_over_commits_nothing(
    folder, monkeypatch
):
    """Its storage is slow, so that it is still in that save when it is stopped, and when it goes on."""
    run = RunDir(folder / "frozen")
    storage = open_storage(run.root)
    control = folder / "control"
    with monkeypatch.context() as patch:
        patch.setenv(FAULTS_VARIABLE, str(control))
        stale = launch(folder, run)
    with stale:
        stale.wait_for_step(run, 20)
        wait_until(lambda: is_committed(run, 20), stale._processes)
        write_fault(control, Fault(kind="slow", rate=0.05))  # MiB/s: some seconds for a checkpoint
        stale.wait_for_step(run, STEPS)
        wait_until(lambda: list(run.checkpoints.glob(f"step-{STEPS:08d}/.*")), stale._processes)
        stale.send(signal.SIGSTOP, 0)
        assert not is_committed(run, STEPS), "it was not in its save"

        start_s = time.monotonic()
        with launch(folder, run) as follower:
            wait_until(lambda: get_newest_generation(storage) == 2, follower._processes)
            assert time.monotonic() - start_s >= LEASE_S - 1
            codes, output = follower.wait()
        assert codes == [0], output
        assert is_committed(run, STEPS)
        control.unlink()
        before = look(run.root)

        stale.send(signal.SIGCONT, 0)
        codes, output = stale.wait()
    assert codes == [2], output
    told = (
        r"python -m elastic \(process \d+ on .*\) took over the run at .* as attempt 2, so attempt 1 is over and writes"
    )
    assert re.search(told, output), output
    after = look(run.root)
    assert {name: after[name] for name in before if not TEMPORARY.search(name)} == {
        name: seen for name, seen in before.items() if not TEMPORARY.search(name)
    }
    assert all(re.search(r"/e00000001-\d+\.safetensors$", name) for name in after.keys() - before.keys()), (
        "it left more than a shard of its own, which the next save removes"
    )

    first, second = read_rows(run.attempts)
    assert [(row["attempt"], row["end"]) for row in (first, second)] == [(1, "lost"), (2, "finished")]
    assert (second["first_step"], second["lost_steps"]) == (21, STEPS - 20)
    unbroken = RunDir(folder / "unbroken")
    with launch(folder, unbroken) as whole:
        assert whole.wait()[0] == [0]
    losses = [[row["loss"] for row in final_rows(read_rows(r.metrics))] for r in (run, unbroken)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert read_samples(run) == read_samples(unbroken)
