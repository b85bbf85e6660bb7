"""One run loses a node with notice, a trainer and a node without, and gains a node; the tests look at what it left.

Its storage is an S3 server that fails now and then.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.cli._runs import open_rows
from cluster.ledger import check_dollars, check_tiling, read_ledger, totals_of
from cluster.report.status import get_status
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows
from elastic.storage import open_storage
from tests.flaky_proxy import FATES
from tests.ray._exact import LOSS_TOLERANCE, compare
from tests.ray._nodes import ROOT, get_env
from tests.ray._stored import BUCKET, StoredRun, nodes, requests
from tests.ray._traces import find_trainers, get_node

__all__ = ["nodes", "requests"]  # fixtures

STEPS = 360
NOTICE_S = 6.0
WORLD_SIZES = [3, 2, 2, 1, 2]


def fetch_running(url: str) -> dict[str, object] | None:
    with open_rows(url) as rows:
        status = get_status(rows, now_s=time.time())
    return status if status["state"] == "running" else None


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The run after four faults, and what was seen of it."""

    run: StoredRun
    dir: RunDir
    """A copy of what is in the bucket."""
    drained: str
    removed: str
    status: dict[str, object]
    """As the bucket told it while the run trained."""


@pytest.fixture(scope="module")
def recovered(nodes, data, tmp_path_factory):
    changes = {"train.steps": STEPS, "wandb.mode": "offline"}
    run = StoredRun(nodes, data, tmp_path_factory.mktemp("driver"), **changes)
    run.start()
    step = run.wait_for_step(30, world_size=3, timeout_s=240)

    drained = nodes.ids[-1]
    deadline_s = time.time() + NOTICE_S
    notice = nodes.folder / f"solvent-notice-{os.getuid()}-{drained[:12]}"  # which the node's watch reads
    notice.write_text(str(NOTICE_S))
    run.wait_for_step(step + 20, world_size=2)
    first = next(row for row in run.rows() if row["world_size"] == 2)
    assert parse_utc(first["time_utc"]) < deadline_s, "the survivors did not train on before the deadline"

    os.kill(next(pid for pid in find_trainers(nodes.folder) if not drained.startswith(get_node(pid))), signal.SIGKILL)
    run.wait_for(lambda: run.last_row()["attempt"] == 3, what="a trainer takes the place of the killed one")
    time.sleep(max(0, deadline_s - time.time()))
    nodes.remove(drained)
    notice.unlink()
    step = run.wait_for_step(run.last_row()["step"] + 20, world_size=2)
    # the bucket is some seconds behind: at first it has the end of the world that was lost, and no row of the next one
    status = run.wait_for(lambda: fetch_running(run.url), what="the bucket's status shows the new world")

    removed = nodes.ids[-1]
    nodes.remove(removed)
    run.wait_for_step(step + 1, world_size=1)
    nodes.add()
    run.wait_for_step(step + 20, world_size=2)
    assert run.wait() == 0, run.get_output()
    print(run.get_output())  # shown if a test fails
    copy = run.fetch(tmp_path_factory.mktemp("bucket"))
    return Recovered(run=run, dir=copy, drained=drained, removed=removed, status=status)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process reads a checkpoint
def test_it_ends_as_an_unbroken_run_on_a_disk(recovered, requests, tmp_path, capsys):
    arguments = [str(recovered.dir.config), f"storage={tmp_path}", "cluster.max_workers=1", "wandb.mode=disabled"]
    command = [sys.executable, "-m", "elastic", *arguments]
    subprocess.run(command, env=get_env(tmp_path), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    unbroken = RunDir(tmp_path / recovered.dir.root.name)
    difference = compare(recovered.dir, unbroken)
    rows, others = ([*final_rows(read_rows(d.metrics))] for d in (recovered.dir, unbroken))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["val_loss"] == pytest.approx(others[-1]["val_loss"], rel=1e-4)
    assert (difference.steps, difference.samples) == (0, 0)
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.state <= difference.state_tolerance
    with capsys.disabled():
        print(f"\n{difference}\nrequests: {dict(requests)}")
    assert sum(requests[fate] for fate in FATES) > 0


def test_attempts_tell_every_world_and_what_its_change_cost(recovered):
    run_dir, drained, removed = recovered.dir, recovered.drained, recovered.removed
    attempts = list(read_rows(run_dir.attempts))
    assert [row["attempt"] for row in attempts] == [1, 2, 3, 4, 5]
    assert [row["world_size"] for row in attempts] == WORLD_SIZES
    assert [row["end"] for row in attempts] == ["interrupted", "lost", "lost", "interrupted", "finished"]
    assert [row["resumed_from"] for row in attempts] == ["scratch", "memory", "memory", "peer", "memory"]
    assert all(len(row["nodes"]) == row["world_size"] for row in attempts)
    assert attempts[0]["reason"].startswith("plain: notice file ")
    assert drained not in attempts[1]["nodes"]
    assert removed not in attempts[3]["nodes"]
    for before, after in pairwise(attempts):
        assert after["first_step"] + after["lost_steps"] == before["last_step"] + 1
        assert parse_utc(before["end_utc"]) <= parse_utc(after["start_utc"]) + 0.001
    assert attempts[-1]["last_step"] == STEPS
    # planned changes wait until the state is safe
    assert attempts[1]["lost_steps"] == attempts[4]["lost_steps"] == 0


def test_outages_are_those_between_the_rows_of_the_metrics(recovered):
    rows = list(read_rows(recovered.dir.metrics))
    outages = [
        parse_utc(after["time_utc"]) - parse_utc(before["time_utc"])
        for before, after in pairwise(rows)
        if after["attempt"] != before["attempt"]
    ]
    attempts = list(read_rows(recovered.dir.attempts))
    assert [row["outage_s"] for row in attempts[1:]] == pytest.approx(outages, abs=0.1)
    assert max(outages) < 5


def test_incidents_name_what_happened_and_where(recovered):
    run_dir, drained, removed = recovered.dir, recovered.drained, recovered.removed
    incidents = list(read_rows(run_dir.incidents))
    attempts = list(read_rows(run_dir.attempts))
    assert [row["kind"] for row in incidents] == ["node_drained", "trainer_lost", "node_lost", "node_added"]
    assert [row["world"] for row in incidents] == ["3 -> 2", "2 -> 2", "2 -> 1", "1 -> 2"]
    assert incidents[0]["node"] == drained
    assert incidents[2]["node"] == removed
    for incident, attempt in zip(incidents, attempts[1:], strict=True):
        for name in ("outage_s", "lost_steps", "resumed_from"):
            assert incident[name] == attempt[name]
        phases_s = incident["phases_s"]
        assert list(phases_s) == ["detect", "leave", "gather", "form", "load", "first_step"]
        assert sum(phases_s.values()) == pytest.approx(incident["outage_s"], abs=0.02)
    assert [row["noticed_s"] is not None for row in incidents] == [True, False, False, True]


def test_the_ledger_tiles_the_paid_time_of_every_node(recovered):
    run_dir, drained, removed = recovered.dir, recovered.drained, recovered.removed
    tiles = read_ledger(read_rows(run_dir.ledger))
    assert check_tiling(tiles) == check_dollars(tiles) == []
    assert len({tile.node for tile in tiles}) == 4
    assert {drained, removed} < {tile.node for tile in tiles}
    # 3.6 USD an hour: one thousandth per second
    assert math.fsum(tile.usd for tile in tiles) == pytest.approx(sum(tile.gpu_ms for tile in tiles) * 1e-6)
    states = {tile.state for tile in tiles}
    assert {"start", "train", "redo", "save", "load", "reconfigure", "eval"} <= states


def test_a_lost_node_is_idle_until_ray_knows_that_it_is_gone(recovered):
    run_dir, removed = recovered.dir, recovered.removed
    tiles = [tile for tile in read_ledger(read_rows(run_dir.ledger)) if tile.node == removed]
    lost_s = next(row["detected_s"] for row in read_rows(run_dir.incidents) if row["kind"] == "node_lost")
    # a peer may see the loss a moment before the coordinator sees the host's end
    after = [tile for tile in tiles if tile.start_ms / 1000 > lost_s + 2]
    assert {tile.state for tile in after} == {"idle"}
    # Ray asks a silent node five times, a second apart, before it calls it dead
    assert after[-1].end_ms / 1000 - lost_s < 25


def test_wandb_shows_the_dollars_of_the_ledger(recovered):
    run_dir = recovered.dir
    totals = totals_of(read_ledger(read_rows(run_dir.ledger)))
    (folder,) = (run_dir.root / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run(
        [wandb, "leet", "inspect", folder, "--summary", "--json"], capture_output=True, check=True, text=True
    )
    summary = json.loads(shown.stdout)["summary"]
    assert summary["train/step"] == STEPS
    assert summary["cost/usd"] == pytest.approx(totals.usd, rel=1e-9)
    assert summary["cost/usd_per_mtoken"] == pytest.approx(totals.usd / summary["train/tokens"] * 1e6, rel=1e-9)
    assert summary["cost/goodput"] == pytest.approx(totals.goodput, abs=1e-3)
    wasted = {cause: summary[f"cost/wasted/{cause}"] for cause in totals.usd_by_cause}
    assert wasted == pytest.approx(totals.usd_by_cause, abs=1e-6)
    assert summary["cost/wasted_usd"] == pytest.approx(sum(wasted.values()), abs=1e-6)


def test_the_bucket_has_every_row_once(recovered):
    run_dir = recovered.dir
    attempts = list(read_rows(run_dir.attempts))
    rows = [(row["attempt"], row["step"]) for row in read_rows(run_dir.metrics)]
    assert len(rows) == len({*rows})
    for attempt in attempts:
        steps = [step for number, step in rows if number == attempt["attempt"]]
        assert steps == list(range(attempt["first_step"], attempt["last_step"] + 1))


def test_nothing_of_the_run_lies_on_a_disk(recovered, nodes):
    run, run_dir = recovered.run, recovered.dir
    names = {path.name for folder in (run.storage, nodes.folder) for path in folder.rglob("*")}
    assert not [
        name for name in names if name.startswith(("s3:", "metrics.jsonl", "samples-", "solvent-spool-", "step-"))
    ]
    assert not (ROOT / "s3:").exists() and not Path("s3:").exists()
    assert not [key for key in open_storage(f"s3://{BUCKET}/runs").list() if "ray" in key]
    assert list(run_dir.root.glob("wandb/offline-run-*/*.wandb")), "nor do the driver's own files"


def test_status_and_report_read_the_bucket(recovered, capsys):
    run = recovered.run
    assert recovered.status["state"] == "running" and recovered.status["step"] > 0
    assert main(["status", run.url, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["run"], status["state"], status["step"], status["incidents"]) == ("r", "finished", STEPS, 4)
    assert main(["report", run.url]) == 0
    assert capsys.readouterr().out == f"{run.url}/report.html\n"
    assert open_storage(run.url).read("report.html").lstrip().lower().startswith(b"<!doctype html>")
