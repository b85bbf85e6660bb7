"""A run on an object store whose head is killed; `test_recovery.py` has other losses there."""

import os
import shutil
import signal

import pytest

from elastic.records.attempts import final_rows
from elastic.records.rundir import read_rows
from tests.ray._exact import read_samples
from tests.ray._runs import TINY
from tests.ray._stored import StoredRun, nodes, requests
from tests.ray._traces import find_processes, find_trainers, wait_until

__all__ = ["nodes", "requests"]  # fixtures
pytestmark = pytest.mark.long

STEPS = 400


def test_rows_up_to_a_commit_outlive_the_head_and_later_ones_its_processes(nodes, data, tmp_path):
    """Killed: driver and coordinator, as by the kernel of a head that has no memory left."""
    run = StoredRun(nodes, data, tmp_path, **{"train.steps": STEPS, "run": "killed"})
    run.start()
    run.wait_for(lambda: run.get_committed_steps()[-1:] >= [40], what="the commit of step 40")
    (coordinator,) = (pid for pid, name in find_processes(nodes.folder).items() if name.startswith("ray::Coordinator"))
    os.kill(coordinator, signal.SIGKILL)
    run.driver.kill()
    run.driver.wait()
    wait_until(lambda: not find_trainers(nodes.folder), timeout_s=180, what="trainers wait half a lease for another")
    (committed,) = run.get_committed_steps()[-1:]
    left = run.rows()
    stored = run.fetch(tmp_path / "then")
    steps = [row["step"] for row in read_rows(stored.metrics)]
    assert steps[:committed] == list(range(1, committed + 1))
    samples = read_samples(stored)
    assert {len(samples[step]) for step in range(1, committed + 1)} == {TINY["train"]["global_batch"]}

    run.start()
    assert run.wait(timeout_s=240) == 0, run.get_output()
    assert run.find_spools() == []
    for path in nodes.folder.glob("solvent-[rf]*-*"):  # what a driver that is killed leaves of its own: empty folders
        assert not [child for child in path.rglob("*") if child.is_file() and not child.name.startswith(".")], path
        shutil.rmtree(path)
    rows = list(read_rows(run.fetch(tmp_path / "now").metrics))
    assert rows[: len(left)] == left
    assert [row["step"] for row in final_rows(rows)] == list(range(1, STEPS + 1))
