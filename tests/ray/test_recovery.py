"""One run loses a node with notice, a trainer and a node without, and gains a node; the tests look at what it left."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.ledger import check_tiling, read_ledger
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows
from tests.ray._exact import read_samples
from tests.ray._nodes import get_env
from tests.ray._runs import Run
from tests.ray._traces import find_trainers, get_node

STEPS = 900
NOTICE_S = 6.0
WORLD_SIZES = [3, 2, 2, 1, 2]


@pytest.fixture(scope="module")
def recovered(nodes, data, tmp_path_factory):
    """The run's directory after four faults, and the two nodes that were lost."""
    run = Run(nodes, data, tmp_path_factory.mktemp("recovered"), **{"train.steps": STEPS, "wandb.mode": "offline"})
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

    removed = nodes.ids[-1]
    nodes.remove(removed)
    run.wait_for_step(step + 1, world_size=1)
    nodes.add()
    run.wait_for_step(step + 20, world_size=2)
    assert run.wait() == 0, run.get_output()
    print(run.get_output())  # shown if a test fails
    return run.dir, drained, removed


@pytest.fixture(scope="module")
def unbroken(recovered, data, tmp_path_factory):
    """The directory of the same run, trained by one process without Ray."""
    run_dir, *_ = recovered
    storage = tmp_path_factory.mktemp("unbroken")
    arguments = [str(run_dir.config), f"storage={storage}", "wandb.mode=disabled", "cluster.max_workers=1"]
    command = [sys.executable, "-m", "elastic", *arguments]
    subprocess.run(command, env=get_env(storage), cwd=storage, check=True, stdout=subprocess.DEVNULL)
    return RunDir(storage / run_dir.root.name)


def rows_of(run_dir: RunDir) -> list[dict]:
    return final_rows(read_rows(run_dir.metrics))


def test_every_step_has_the_loss_of_an_unbroken_run(recovered, unbroken):
    losses = [row["loss"] for row in rows_of(recovered[0])]
    assert len(losses) == STEPS
    assert losses == pytest.approx([row["loss"] for row in rows_of(unbroken)], rel=1e-4)
    assert rows_of(recovered[0])[-1]["val_loss"] == pytest.approx(rows_of(unbroken)[-1]["val_loss"], rel=1e-4)


def test_every_step_consumes_the_samples_of_an_unbroken_run_once(recovered, unbroken):
    assert read_samples(recovered[0]) == read_samples(unbroken)


def test_attempts_tell_every_world_and_what_its_change_cost(recovered):
    run_dir, drained, removed = recovered
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
    rows = list(read_rows(recovered[0].metrics))
    outages = [
        parse_utc(after["time_utc"]) - parse_utc(before["time_utc"])
        for before, after in pairwise(rows)
        if after["attempt"] != before["attempt"]
    ]
    attempts = list(read_rows(recovered[0].attempts))
    assert [row["outage_s"] for row in attempts[1:]] == pytest.approx(outages, abs=0.1)
    assert max(outages) < 5


def test_incidents_name_what_happened_and_where(recovered):
    run_dir, drained, removed = recovered
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
    run_dir, drained, removed = recovered
    tiles = read_ledger(read_rows(run_dir.ledger))
    assert check_tiling(tiles) == []
    assert len({tile.node for tile in tiles}) == 4
    assert {drained, removed} < {tile.node for tile in tiles}
    # 3.6 USD an hour: one thousandth per second
    assert math.fsum(tile.usd for tile in tiles) == pytest.approx(sum(tile.gpu_ms for tile in tiles) * 1e-6)
    states = {tile.state for tile in tiles}
    assert {"start", "train", "redo", "save", "load", "reconfigure", "eval"} <= states


def test_a_lost_node_is_idle_until_ray_knows_that_it_is_gone(recovered):
    run_dir, _, removed = recovered
    tiles = [tile for tile in read_ledger(read_rows(run_dir.ledger)) if tile.node == removed]
    lost_s = next(row["detected_s"] for row in read_rows(run_dir.incidents) if row["kind"] == "node_lost")
    # a peer may see the loss a moment before the coordinator sees the host's end
    after = [tile for tile in tiles if tile.start_ms / 1000 > lost_s + 2]
    assert {tile.state for tile in after} == {"idle"}
    # Ray asks a silent node five times, a second apart, before it calls it dead
    assert after[-1].end_ms / 1000 - lost_s < 25


def test_wandb_shows_the_dollars_of_the_ledger(recovered):
    run_dir, *_ = recovered
    usd = math.fsum(row["usd"] for row in read_rows(run_dir.ledger))
    (folder,) = (run_dir.root / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run(
        [wandb, "leet", "inspect", folder, "--summary", "--json"], capture_output=True, check=True, text=True
    )
    summary = json.loads(shown.stdout)["summary"]
    assert summary["train/step"] == STEPS
    assert summary["cost/usd"] == pytest.approx(usd, rel=1e-9)
