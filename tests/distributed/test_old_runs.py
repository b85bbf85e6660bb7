"""A run that the code of an earlier commit has left half done goes on as if nothing had changed.

`data/build_old_run.py` says how it was made, and by which commit.
"""

import shutil
from pathlib import Path

import pytest

from elastic.checkpoint.format.manifest import list_committed
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.distributed._launch import Ranks, read_samples

OLD = Path(__file__).parent / "data" / "old_run"
LEFT_AT, STEPS = 7, 12


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The old run, trained to its end by the present code."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    where = (f"data.path={folder / 'data'}", f"storage={folder / 'runs'}", "run=broken")
    with Ranks(1, str(folder / "config.yaml"), *where) as ranks:
        codes, output = ranks.wait()
    assert codes == [0], output
    return RunDir(folder / "runs" / "broken")


def test_an_old_run_goes_on_from_its_last_state(resumed):
    old, new = read_rows(resumed.attempts)
    assert (old["last_step"], old["end"]) == (LEFT_AT, "interrupted")
    assert (new["first_step"], new["last_step"], new["lost_steps"]) == (LEFT_AT + 1, STEPS, 0)
    assert (new["resumed_from"], new["end"]) == ("disk", "finished")
    assert list_committed(open_storage(resumed.root))[-1].step == STEPS


def test_an_old_run_has_the_losses_of_the_unbroken_run_recorded_with_it(resumed):
    unbroken = final_rows(read_rows(OLD / "unbroken" / "metrics.jsonl"))
    rows = final_rows(read_rows(resumed.metrics))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in unbroken], rel=0, abs=1e-6)


def test_an_old_run_takes_the_samples_of_the_unbroken_run_in_their_order(resumed):
    unbroken = {row["step"]: row["ids"] for row in read_rows(OLD / "unbroken" / "samples-1-0.jsonl")}
    assert {step: list(ids) for step, ids in read_samples(resumed).items()} == unbroken
