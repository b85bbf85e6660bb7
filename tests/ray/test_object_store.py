"""A run on a cluster whose storage is an S3 server that fails now and then: faults, and a head that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.cli._runs import open_rows
from cluster.report.status import get_status
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.flaky_proxy import FATES, open_proxy
from tests.ray._exact import LOSS_TOLERANCE, compare, read_samples
from tests.ray._nodes import ROOT, get_env, open_nodes
from tests.ray._runs import TINY, Run
from tests.ray._traces import find_processes, find_trainers, wait_until

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # one process reads a checkpoint
]

BUCKET = "solvent-ray"
STEPS = 400
FAILING = 0.01


class StoredRun(Run):
    """A run in the bucket; while it trains, its rows are in the spool of the coordinator, on this machine."""

    def __init__(self, nodes, data, folder, **overrides):
        super().__init__(nodes, data, folder, **overrides)
        self.overrides["storage"] = f"s3://{BUCKET}/runs"
        self.url = f"{self.overrides['storage']}/{self.overrides['run']}"

    def find_spools(self):
        return list(self.nodes.folder.glob("solvent-spool-*"))

    def rows(self):
        return [row for spool in self.find_spools() for row in read_rows(RunDir(spool).metrics)]

    def get_committed_steps(self):
        keys = open_storage(self.url).list("checkpoints/")
        return sorted(int(key.split("/")[1][5:]) for key in keys if key.endswith("COMMITTED"))

    def fetch(self, folder):
        """Copy everything out of the bucket."""
        storage = open_storage(self.url)
        for key in storage.list():
            path = folder / self.overrides["run"] / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read(key))
        return RunDir(folder / self.overrides["run"])


@pytest.fixture(scope="module")
def requests(s3_endpoint):
    """Set the environment of nodes and drivers: a bucket behind a proxy; return what was done to requests."""
    import boto3

    with pytest.MonkeyPatch.context() as patch, open_proxy(s3_endpoint, rate=FAILING, seed=1) as (url, done):
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", url),
        ):
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield done


@pytest.fixture(scope="module")
def nodes(requests):
    with open_nodes(3) as nodes:
        yield nodes


def fetch_running(url: str) -> dict[str, object] | None:
    with open_rows(url) as rows:
        status = get_status(rows, now_s=time.time())
    return status if status["state"] == "running" else None


@pytest.fixture(scope="module")
def recovered(nodes, data, tmp_path_factory):
    """The run, after the loss of a trainer and of a node, its status before, and a copy of what is in the bucket."""
    changes = {"train.steps": STEPS, "wandb.mode": "offline"}
    run = StoredRun(nodes, data, tmp_path_factory.mktemp("driver"), **changes)
    run.start()
    step = run.wait_for_step(30, world_size=3, timeout_s=180)
    os.kill(find_trainers(nodes.folder)[0], signal.SIGKILL)
    run.wait_for(lambda: run.last_row()["attempt"] == 2, what="a trainer takes the place of the killed one")
    step = run.wait_for_step(run.last_row()["step"] + 20, world_size=3)
    # the bucket is some seconds behind: at first it has the end of the world that was lost, and no row of the next one
    status = run.wait_for(lambda: fetch_running(run.url), what="the bucket's status shows the new world")
    nodes.remove(nodes.ids[-1])
    run.wait_for_step(step + 1, world_size=2)
    assert run.wait(timeout_s=240) == 0, run.get_output()
    print(run.get_output())  # shown if a test fails
    return run, status, run.fetch(tmp_path_factory.mktemp("bucket"))


def test_it_ends_as_an_unbroken_run_on_a_disk(recovered, requests, tmp_path, capsys):
    *_, run_dir = recovered
    arguments = [str(run_dir.config), f"storage={tmp_path}", "cluster.max_workers=1", "wandb.mode=disabled"]
    command = [sys.executable, "-m", "elastic", *arguments]
    subprocess.run(command, env=get_env(tmp_path), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    difference = compare(run_dir, RunDir(tmp_path / run_dir.root.name))
    assert [row["step"] for row in final_rows(read_rows(run_dir.metrics))] == list(range(1, STEPS + 1))
    assert (difference.steps, difference.samples) == (0, 0)
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.state <= difference.state_tolerance
    with capsys.disabled():
        print(f"\n{difference}\nrequests: {dict(requests)}")
    assert sum(requests[fate] for fate in FATES) > 0


def test_the_bucket_has_every_row_once_and_its_books_add_up(recovered):
    *_, run_dir = recovered
    attempts = list(read_rows(run_dir.attempts))
    assert [row["end"] for row in attempts] == ["lost", "lost", "finished"]
    assert [row["kind"] for row in read_rows(run_dir.incidents)] == ["trainer_lost", "node_lost"]
    assert any(read_rows(run_dir.ledger))
    rows = [(row["attempt"], row["step"]) for row in read_rows(run_dir.metrics)]
    assert len(rows) == len({*rows})
    for attempt in attempts:
        steps = [step for number, step in rows if number == attempt["attempt"]]
        assert steps == list(range(attempt["first_step"], attempt["last_step"] + 1))


def test_nothing_of_the_run_lies_on_a_disk(recovered, nodes):
    run, *_, run_dir = recovered
    names = {path.name for folder in (run.storage, nodes.folder) for path in folder.rglob("*")}
    assert not [
        name for name in names if name.startswith(("s3:", "metrics.jsonl", "samples-", "solvent-spool-", "step-"))
    ]
    assert not (ROOT / "s3:").exists() and not Path("s3:").exists()
    assert not [key for key in open_storage(f"s3://{BUCKET}/runs").list() if "ray" in key]
    assert list(run_dir.root.glob("wandb/offline-run-*/*.wandb")), "nor do the driver's own files"


def test_status_and_report_read_the_bucket(recovered, capsys):
    run, while_it_ran, _ = recovered
    assert while_it_ran["state"] == "running" and while_it_ran["step"] > 0
    assert main(["status", run.url, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["run"], status["state"], status["step"], status["incidents"]) == ("r", "finished", STEPS, 2)
    assert main(["report", run.url]) == 0
    assert capsys.readouterr().out == f"{run.url}/report.html\n"
    assert open_storage(run.url).read("report.html").lstrip().lower().startswith(b"<!doctype html>")


@pytest.mark.long
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
