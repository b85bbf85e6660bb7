"""One run whose drivers end, are killed, meet and come back; what they leave behind is as agreed, or nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from cluster.ledger import check_dollars, check_tiling, read_ledger
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows
from tests.ray._drivers import committed_steps, find_coordinators, kill, kill_coordinator, wait_until_gone
from tests.ray._exact import read_losses, read_samples
from tests.ray._nodes import get_env, open_nodes
from tests.ray._runs import Run
from tests.ray._traces import (
    find_at_work,
    find_hosts,
    find_processes,
    find_trainers,
    is_alive,
    wait_until,
)

SHORT_LEASE_S = 14
SLACK_S = 4
LEASE_S = 60
"""Half of it must do for another driver or coordinator to come, on a busy machine."""
LONG = 100_000
"""More steps than any test waits for."""


@pytest.fixture(scope="module")
def nodes():
    """Two: each start of a run warms all of them up, and the machine has two cores."""
    with open_nodes(2) as nodes:
        yield nodes


def let_sleep(pids, seconds):
    """Stop processes for a while, as a machine does that is shut or paused; they wake one after the other."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)


def look(run) -> dict[str, tuple[int, bytes]]:
    """The files that no living driver of the run writes."""
    own = re.compile(r"(metrics|ledger|samples-\d+-\d+)\.jsonl|leader\.json|checkpoints/.*|\..*\.tmp|epochs/\..*\.tmp")
    files = [path for path in run.dir.root.rglob("*") if path.is_file()]
    names = {path: path.relative_to(run.dir.root).as_posix() for path in files}
    return {
        name: (path.stat().st_mtime_ns, path.read_bytes()) for path, name in names.items() if not own.fullmatch(name)
    }


@dataclass
class Journey:
    """What was seen of the run on its way."""

    run: Run
    seen: dict[str, Any] = field(default_factory=dict[str, Any])


@pytest.fixture(scope="module")
def journey(nodes, data, tmp_path_factory):
    """Five drivers of one run, one after the other, and three that are refused meanwhile."""
    folder = tmp_path_factory.mktemp("journey")
    settings = {"train.steps": LONG, "checkpoint.every_steps": 1000, "checkpoint.memory_every_steps": 5}
    settings |= {"optim.min_lr_ratio": 1, "fault.lease_s": LEASE_S}
    journey = Journey(Run(nodes, data, folder / "run", **settings))
    try:
        for act in (lose_the_driver, find_the_trainers, refuse_others, lose_the_coordinator, make_room_and_stop):
            act(journey, journey.run, nodes)
    finally:
        for pid, command in find_processes(nodes.folder).items():
            if "cluster.cli" in command or "-m elastic" in command:  # what a failure has left: it would train on
                os.kill(pid, signal.SIGKILL)
        print(journey.run.get_output())  # shown if a test fails
    return journey


def lose_the_driver(journey, run, nodes):
    """The driver and its coordinator sleep for more than half a lease; then the driver is killed, and none follows."""
    run.start(fault__lease_s=SHORT_LEASE_S)
    run.wait_for_step(10, timeout_s=240)
    let_sleep([*find_coordinators(run), run.driver.pid], SHORT_LEASE_S / 2 + 1)
    run.wait_for_step(run.last_row()["step"] + 10)
    journey.seen["attempts after sleep"] = {row["attempt"] for row in run.rows()}
    at_work = [*find_hosts(nodes.folder), *find_trainers(nodes.folder)]
    kill(run)
    wait_until_gone(nodes, timeout_s=SHORT_LEASE_S + SLACK_S)
    wait_until(lambda: not any(map(is_alive, at_work)), timeout_s=2, what="hosts and trainers are gone")
    journey.seen["abandoned"] = (run.last_row()["step"], committed_steps(run), list(read_rows(run.dir.attempts)))


def find_the_trainers(journey, run, nodes):
    """The same command resumes; its driver is killed, and the same command comes again at once."""
    run.start()
    run.wait_for(lambda: run.last_row()["attempt"] > 1, what="it resumes")
    run.wait_for_step(run.last_row()["step"] + 10, world_size=2)
    journey.seen["at work"] = (find_at_work(nodes.folder), run.last_row()["attempt"])  # more than 2 if a node was late
    kill(run)
    journey.seen["killed_s"] = time.monotonic()
    run.start()
    run.wait_for(lambda: "ranks 2" in run.get_output(newest=True), what="the new driver shows a step")


def refuse_others(journey, run, nodes):
    """The same command on this cluster, on one of its own, and without any."""
    before = look(run)
    second = copy(run)
    second.start(wandb__mode="offline")
    alone = subprocess.Popen(
        [sys.executable, "-m", "elastic", str(run.dir.config), "cluster.max_workers=1", "wandb.mode=offline"],
        env=get_env(nodes.folder),
        cwd=run.storage,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    refused = [(second.wait(timeout_s=180), second.get_output(newest=True))]
    elsewhere = copy(second)
    elsewhere.nodes = copy(nodes)
    elsewhere.nodes.address = ""  # a cluster of its own
    elsewhere.start(wandb__mode="offline")
    said = alone.communicate(timeout=180)[1]
    refused += [(alone.returncode, said), (elsewhere.wait(timeout_s=180), elsewhere.get_output(newest=True))]
    shutil.rmtree(nodes.folder / "ray")  # of the cluster elsewhere
    journey.seen["refused"] = (refused, before, look(run))
    run.num_starts = elsewhere.num_starts
    time.sleep(max(0.0, journey.seen["killed_s"] + LEASE_S / 2 + 2 - time.monotonic()))
    step = run.last_row()["step"]
    run.wait_for_step(step + 10)
    journey.seen["half a lease later"] = (find_at_work(nodes.folder), run.last_row()["attempt"])


def lose_the_coordinator(journey, run, nodes):
    """Under a driver that did not create it."""
    before, at_work = run.last_row(), find_at_work(nodes.folder)
    kill_coordinator(run)
    killed_s = time.time()
    run.wait_for(lambda: run.last_row()["attempt"] > before["attempt"], what="the world of another coordinator")
    run.wait_for_step(run.last_row()["step"] + 20)
    journey.seen["coordinator"] = (before, killed_s, run.last_row(), find_at_work(nodes.folder) == at_work)


def make_room_and_stop(journey, run, nodes):
    """The driver is killed and another configuration comes; Ctrl-C, and the same command trains it to its end."""
    before = run.last_row()["attempt"]
    kill(run)
    run.start(train__steps=LONG - 1)
    run.wait_for(lambda: run.last_row()["attempt"] > before, what="a world of the other configuration")
    run.wait_for_step(run.last_row()["step"] + 10)
    run.driver.send_signal(signal.SIGINT)
    code = run.wait()
    wait_until_gone(nodes)
    last = run.last_row()["step"]
    journey.seen["stopped"] = (code, last, committed_steps(run), list(read_rows(run.dir.attempts)), before)
    run.start(train__steps=last + 5)
    journey.seen["finished"] = (run.wait(), last + 5)


@pytest.fixture(scope="module")
def unbroken(journey):
    """The same run without any loss, by one process without Ray."""
    run = journey.run
    changes = [f"{key}={value}" for key, value in {**run.overrides, "run": "unbroken"}.items()]
    changes += ["cluster.max_workers=1", f"train.steps={journey.seen['finished'][1]}"]
    command = [sys.executable, "-m", "elastic", run.storage / "tiny.yaml", *changes]
    subprocess.run(command, env=get_env(run.storage), cwd=run.storage, check=True, stdout=subprocess.DEVNULL)
    return RunDir(run.storage / "unbroken")


def test_what_sleeps_with_its_driver_is_not_without_one(journey):
    assert journey.seen["attempts after sleep"] == {1}


def test_without_a_driver_all_is_saved_and_gone_within_the_lease_and_the_same_command_resumes(journey):
    last, committed, (first,) = journey.seen["abandoned"]
    assert committed == [last]
    assert (first["end"], first["last_step"]) == ("interrupted", last)
    second = list(read_rows(journey.run.dir.attempts))[1]
    assert (second["first_step"], second["lost_steps"]) == (last + 1, 0)


def test_after_a_killed_driver_the_same_command_finds_the_trainers_at_work(journey):
    """A coordinator without a driver would have parked them."""
    assert [len(pids) for pids in journey.seen["at work"][0]] == [2, 2, 2]
    assert journey.seen["half a lease later"] == journey.seen["at work"]


def test_whoever_else_trains_a_run_is_refused_and_harms_nothing(journey):
    ((code, output), *led), before, after = journey.seen["refused"]
    assert code == 2
    assert "run='r' is being trained by another driver" in output
    told = re.compile(r"is led by solvent train \(process \d+ on .*\) right now.*touched nothing.*run=")
    for code, output in led:
        assert code == 2, output
        assert told.search(output), output
    assert {"config.yaml", "epochs/00000001"} <= set(before)
    assert after == before


def test_a_coordinator_that_dies_is_followed_by_another_under_which_the_same_trainers_train_on(journey, nodes):
    run = journey.run
    before, killed_s, after, are_the_same = journey.seen["coordinator"]
    assert are_the_same
    assert (after["attempt"], after["world_size"]) == (before["attempt"] + 1, 2)
    assert "the coordinator was gone; its hold is taken again" in run.get_output()
    first, second = [
        row for row in read_rows(run.dir.attempts) if row["attempt"] in (before["attempt"], after["attempt"])
    ]
    assert (first["end"], first["change"], first["world_size"]) == ("lost", "coordinator_lost", 2)
    assert first["last_step"] >= before["step"]
    # another coordinator needs seconds, in which the world trains on
    last = [row for row in run.rows() if row["attempt"] == before["attempt"]][-1]
    assert parse_utc(last["time_utc"]) > killed_s + 1
    assert second["resumed_from"] == "memory"
    assert second["first_step"] + second["lost_steps"] == first["last_step"] + 1
    (incident,) = [row for row in read_rows(run.dir.incidents) if row["kind"] == "coordinator_lost"]
    assert (incident["resumed_from"], incident["world"]) == ("memory", "2 -> 2")
    assert incident["outage_s"] == pytest.approx(sum(incident["phases_s"].values()), abs=0.1)
    ledger = read_ledger(read_rows(run.dir.ledger))
    assert check_tiling(ledger) == check_dollars(ledger) == []
    assert {row.node for row in ledger} == set(nodes.ids)


def test_a_driver_with_another_configuration_has_the_old_trainers_save_and_make_room(journey):
    *_, attempts, before = journey.seen["stopped"]
    old, new, *_ = (row for row in attempts if row["attempt"] >= before)
    assert old["end"] == "interrupted"
    assert (new["first_step"], new["lost_steps"]) == (old["last_step"] + 1, 0)


def test_ctrl_c_saves_at_the_step_it_has_come_to_and_the_same_command_resumes(journey):
    code, last, committed, attempts, _ = journey.seen["stopped"]
    assert code == 3
    assert committed[-1] == last
    assert (attempts[-1]["end"], attempts[-1]["last_step"]) == ("interrupted", last)
    assert journey.seen["finished"][0] == 0, journey.run.get_output(newest=True)
    resumed = list(read_rows(journey.run.dir.attempts))[len(attempts)]
    assert (resumed["first_step"], resumed["lost_steps"]) == (last + 1, 0)


def test_every_step_has_the_samples_and_the_loss_of_an_unbroken_run(journey, unbroken):
    run = journey.run
    steps = [row["step"] for row in final_rows(read_rows(run.dir.metrics))]
    assert steps == list(range(1, journey.seen["finished"][1] + 1))
    assert read_samples(run.dir) == read_samples(unbroken)
    assert read_losses(run.dir) == pytest.approx(read_losses(unbroken), rel=1e-4)
    for before, after in pairwise(read_rows(run.dir.attempts)):
        assert after["first_step"] + after["lost_steps"] == before["last_step"] + 1
