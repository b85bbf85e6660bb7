"""One run meets a frozen trainer, a trainer stuck in its storage and a frozen node; nothing waits for a time-out."""

import os
import signal
import time
from pathlib import Path

import pytest

from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from tests.ray._runs import Run
from tests.ray._traces import find_hosts, find_trainers, get_parent

STEPS = 200
SILENT_S, HANG_STEP_S, HANG_DATA_S = 4.0, 3.0, 5.0
HOST_SILENT_S = 4.0
SLACK_S = 6.0
"""For the new world to form and to make its first step, on a machine that does other things as well."""


def find_trainer_of(folder: Path, node: str) -> int:
    """Return the trainer of a node: its log lies in the folder of the node's host."""
    (pid,) = (pid for pid in find_trainers(folder) if node[:12] in str(Path(f"/proc/{pid}/fd/1").readlink()))
    return pid


@pytest.fixture(scope="module")
def hung(nodes, data, tmp_path_factory):
    """The run's directory, its output, the node that hung twice, and the node that was frozen as a whole."""
    limits = {"silent_s": SILENT_S, "hang_step_s": HANG_STEP_S, "hang_data_s": HANG_DATA_S}
    run = Run(
        nodes,
        data,
        tmp_path_factory.mktemp("hung"),
        **{"train.steps": STEPS, "checkpoint.every_steps": 10},
        **{f"fault.{name}": value for name, value in limits.items()},
    )
    run.start()
    run.wait_for_step(30, world_size=3, timeout_s=240)
    by_rank = sorted(nodes.ids)  # the slots of a world are in the order of their nodes

    # in attempt 2, rank 1 will find a file that never opens: a storage that hangs
    stuck = run.dir.samples(attempt=2, rank=1)
    os.mkfifo(stuck)
    os.kill(find_trainer_of(nodes.folder, by_rank[1]), signal.SIGSTOP)
    run.wait_for(lambda: run.last_row()["attempt"] == 2, what="a world without the frozen trainer")
    step = run.last_row()["step"]
    run.wait_for(lambda: run.last_row()["attempt"] == 3, what="a world without the stuck trainer")
    stuck.unlink()

    step = run.wait_for_step(step + 20, world_size=2)
    trainer = find_trainer_of(nodes.folder, by_rank[0])
    frozen = [trainer, get_parent(trainer)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    run.wait_for_step(step + 20, world_size=1)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    deadline_s = time.monotonic() + 60
    while frozen[1] in find_hosts(nodes.folder) or frozen[0] in find_trainers(nodes.folder):
        assert time.monotonic() < deadline_s, "a node that came back late keeps its old trainers"
        time.sleep(0.1)
    assert run.wait() == 0, run.get_output()
    print(run.get_output())  # shown if a test fails
    return run, by_rank[1], by_rank[0]


def test_hangs_are_told_from_losses_with_who_and_where(hung):
    run, hangs, frozen = hung
    incidents = list(read_rows(run.dir.incidents))[:3]  # the frozen node may come back as a new one
    assert [row["kind"] for row in incidents] == ["trainer_stalled", "trainer_stalled", "node_lost"]
    assert [row["node"] for row in incidents] == [hangs, hangs, frozen]
    reasons = [row["reason"] for row in read_rows(run.dir.attempts)]
    assert "rank 1 is frozen (no sign of life)" in reasons[0]
    assert "rank 1 is writing its rows" in reasons[1]
    assert "silent" in reasons[2]


def test_a_node_whose_trainers_hang_twice_in_a_row_is_left_out(hung):
    run, hangs, _ = hung
    attempts = list(read_rows(run.dir.attempts))[:4]
    assert [row["world_size"] for row in attempts] == [3, 3, 2, 1]
    assert [hangs in row["nodes"] for row in attempts] == [True, True, False, False]


def test_nothing_waits_for_the_collective_timeout(hung):
    run, *_ = hung
    outages = [row["outage_s"] for row in read_rows(run.dir.incidents)][:3]
    print(f"outages: {outages}")
    for outage_s, limit_s in zip(outages, (SILENT_S, HANG_DATA_S, HOST_SILENT_S), strict=True):
        assert outage_s < limit_s + SLACK_S


def test_the_stacks_of_those_that_waited_are_in_the_log(hung):
    run, *_ = hung
    assert "the stacks of all threads" in run.get_output()
    assert "in run_loop" in run.get_output()


def test_every_sample_is_used_once_all_the_same(hung):
    run, *_ = hung
    rows = final_rows(read_rows(run.dir.metrics))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert samples_are_whole(run.dir, rows)


def samples_are_whole(run: RunDir, rows) -> bool:
    """Each step's samples, of the attempt whose row counts, are a whole global batch without repetition."""
    attempts = {row["step"]: row["attempt"] for row in rows}
    samples = {step: [] for step in attempts}
    for path in run.root.glob("samples-*.jsonl"):
        for row in read_rows(path):
            if attempts[row["step"]] == int(path.stem.split("-")[1]):
                samples[row["step"]] += row["ids"]
    return all(len(ids) == len(set(ids)) == 24 for ids in samples.values())
