"""Drivers end, are killed, meet and come back; what they leave behind is what the contract says, or nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import copy

import pytest

from cluster.ledger import check_tiling, read_ledger
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows
from tests.ray._exact import read_losses, read_samples
from tests.ray._nodes import get_env, open_nodes
from tests.ray._runs import Run
from tests.ray._traces import (
    find_agents,
    find_at_work,
    find_hosts,
    find_processes,
    find_trainers,
    is_alive,
    wait_until,
)

LEASE_S = 14
LONG = 100_000
"""More steps than any test waits for."""


@pytest.fixture(scope="module")
def nodes():
    """Two: each start of a run warms all of them up, and the machine has two cores."""
    with open_nodes(2) as nodes:
        yield nodes


@pytest.fixture
def run(nodes, data, tmp_path):
    run = Run(nodes, data, tmp_path, **{"train.steps": LONG, "fault.lease_s": LEASE_S, "checkpoint.every_steps": 1000})
    yield run
    if run.driver and run.driver.poll() is None:
        run.driver.send_signal(signal.SIGINT)
        run.wait()
    wait_until_gone(nodes)


def find_own(nodes) -> dict[int, str]:
    """The processes of runs, without those of Ray itself (whose Train keeps one actor per cluster for ever)."""
    ours = re.compile(r"cluster\.(runtime|cli)|ray::(Coordinator|RayTrainWorker|TrainController)")
    return {pid: command[:80] for pid, command in find_processes(nodes.folder).items() if ours.search(command)}


def wait_until_gone(nodes, *, timeout_s=60):
    def find_folders():
        return list(nodes.folder.glob("solvent-*"))

    def is_gone():
        return not find_own(nodes) and not find_folders()

    wait_until(is_gone, timeout_s=timeout_s, what=lambda: f"gone: {find_own(nodes)}, {find_folders()}")


def kill(run) -> None:
    """End the driver as a lost connection or the kernel would."""
    run.driver.kill()
    run.driver.wait()


def committed_steps(run) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.dir.checkpoints.glob("*/COMMITTED"))


def test_ctrl_c_saves_at_the_step_it_has_come_to_and_the_same_command_resumes(run, nodes):
    run.start()
    run.wait_for_step(20, timeout_s=240)
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()
    wait_until_gone(nodes)
    last = run.last_row()["step"]
    assert committed_steps(run) == [last]
    assert [row["end"] for row in read_rows(run.dir.attempts)] == ["interrupted"]

    run.start(**{"train.steps": last + 5})
    assert run.wait() == 0, run.get_output()
    second = list(read_rows(run.dir.attempts))[1]
    assert (second["resumed_from"], second["first_step"], second["lost_steps"]) == ("disk", last + 1, 0)
    assert [row["step"] for row in final_rows(read_rows(run.dir.metrics))] == list(range(1, last + 6))


def test_what_makes_trainers_fail_ends_the_run_with_their_reason(run, nodes):
    run.start(**{"optim.lr": 1e30})  # weights overflow, and the loss of the next step is not finite

    assert run.wait() == 1, run.get_output()
    wait_until_gone(nodes)
    assert "lower optim.lr" in run.get_output()
    assert [row["end"] for row in read_rows(run.dir.attempts)] == ["failed"]


def test_after_a_killed_driver_the_same_command_finds_the_trainers_at_work(run, nodes):
    run.overrides["fault.lease_s"] = 2 * LEASE_S  # half of it must do for a driver to start on a busy machine
    run.start()
    run.wait_for_step(10, timeout_s=240)
    trainers = find_trainers(nodes.folder)
    assert len(trainers) == 2
    kill(run)
    step = run.last_row()["step"]

    run.start()
    run.wait_for(lambda: "ranks 2" in run.get_output(newest=True), timeout_s=180, what="the new driver shows a step")
    time.sleep(LEASE_S)  # a coordinator without a driver would have parked them

    assert run.last_row()["step"] > step
    assert find_trainers(nodes.folder) == trainers
    assert {row["attempt"] for row in run.rows()} == {1}

    kill(run)
    last = run.last_row()["step"] + 50
    run.start(**{"train.steps": last})  # another configuration: the old one saves and makes room
    assert run.wait() == 0, run.get_output()
    attempts = list(read_rows(run.dir.attempts))
    assert (attempts[0]["end"], attempts[-1]["end"]) == ("interrupted", "finished")
    assert not any(row["lost_steps"] for row in attempts)


def let_sleep(pids, seconds):
    """Stop processes for a while, as a machine does that is shut or paused; they wake one after the other."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)


def test_without_a_driver_all_is_saved_and_gone_within_the_lease_and_the_same_command_resumes(run, nodes):
    run.start()
    run.wait_for_step(10, timeout_s=240)
    (coordinator,) = [pid for pid, command in find_own(nodes).items() if "ray::Coordinator" in command]
    let_sleep([coordinator, run.driver.pid], LEASE_S / 2 + 1)
    step = run.last_row()["step"]
    run.wait_for_step(step + 10)
    assert {row["attempt"] for row in run.rows()} == {1}, "what sleeps with its driver is not without one"

    hosts, trainers = find_hosts(nodes.folder), find_trainers(nodes.folder)
    kill(run)

    wait_until_gone(nodes, timeout_s=LEASE_S + 2)

    wait_until(lambda: not any(map(is_alive, hosts + trainers)), timeout_s=2, what="hosts and trainers are gone")
    last = run.last_row()["step"]
    assert committed_steps(run) == [last]
    run.start(**{"train.steps": last + 5})
    assert run.wait() == 0, run.get_output()
    first, second, *_ = read_rows(run.dir.attempts)  # more if a node was late
    assert (first["end"], first["last_step"]) == ("interrupted", last)
    assert (second["first_step"], second["lost_steps"]) == (last + 1, 0)


def look(run) -> dict[str, tuple[int, bytes]]:
    """The files that no living driver of the run writes."""
    own = re.compile(r"(metrics|ledger|samples-1-\d+)\.jsonl|leader\.json|checkpoints/.*|\..*\.tmp|epochs/\..*\.tmp")
    files = [path for path in run.dir.root.rglob("*") if path.is_file()]
    names = {path: path.relative_to(run.dir.root).as_posix() for path in files}
    return {
        name: (path.stat().st_mtime_ns, path.read_bytes()) for path, name in names.items() if not own.fullmatch(name)
    }


def test_whoever_else_trains_a_run_is_refused_and_harms_nothing(run, nodes, tmp_path):
    run.start()
    run.wait_for_step(10, timeout_s=240)
    trainers = find_trainers(nodes.folder)
    before = look(run)
    assert {"config.yaml", "epochs/00000001"} <= set(before)

    second = copy(run)
    second.start(**{"wandb.mode": "offline"})
    assert second.wait(timeout_s=30) == 2
    assert "run='r' is being trained by another driver" in second.get_output()

    elsewhere = copy(run)
    elsewhere.nodes = copy(nodes)
    elsewhere.nodes.address = ""  # a cluster of its own
    elsewhere.start(**{"wandb.mode": "offline"})
    alone = subprocess.run(
        [sys.executable, "-m", "elastic", str(run.dir.config), "cluster.max_workers=1", "wandb.mode=offline"],
        env=get_env(nodes.folder),
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert alone.returncode == 2, alone.stderr
    assert elsewhere.wait(timeout_s=180) == 2, elsewhere.get_output()
    for output in (alone.stderr, elsewhere.get_output(newest=True)):
        assert re.search(r"is led by solvent train \(process \d+ on .*\) right now.*touched nothing.*run=", output), (
            output
        )

    shutil.rmtree(nodes.folder / "ray")  # of the cluster elsewhere
    assert look(run) == before
    assert run.driver.poll() is None
    assert find_trainers(nodes.folder) == trainers
    step = run.last_row()["step"]
    run.wait_for_step(step + 10)
    assert {row["attempt"] for row in run.rows()} == {1}


def kill_coordinator(run) -> int:
    """Kill the run's coordinator as the kernel would; return its process id."""
    # Ray writes the title of a process anew at each call, and whoever reads it at that moment sees none
    (pid,) = wait_until(lambda: find_coordinators(run), timeout_s=60, what=lambda: f"a coordinator\n{run.get_output()}")
    os.kill(pid, signal.SIGKILL)
    return pid


def find_coordinators(run) -> list[int]:
    return [pid for pid, command in find_own(run.nodes).items() if "ray::Coordinator" in command]


@pytest.mark.parametrize(
    "led_by", [pytest.param("the driver that created it", marks=pytest.mark.long), "a driver that found it"]
)
def test_a_coordinator_that_dies_is_followed_by_another_under_which_the_same_trainers_train_on(run, nodes, led_by):
    run.overrides |= {"fault.lease_s": 240, "checkpoint.memory_every_steps": 5, "optim.min_lr_ratio": 1}
    run.start()
    run.wait_for_step(10, world_size=2, timeout_s=240)
    if led_by == "a driver that found it":
        kill(run)
        run.start()
        run.wait_for(
            lambda: "ranks 2" in run.get_output(newest=True), timeout_s=180, what="the new driver shows a step"
        )
    at_work = find_at_work(nodes.folder)
    agents = find_agents(nodes.folder)
    step = run.last_row()["step"]
    kill_coordinator(run)
    killed_s = time.time()

    run.wait_for(lambda: run.last_row()["attempt"] == 2, timeout_s=180, what="the world of another coordinator")
    run.wait_for_step(run.last_row()["step"] + 20)
    assert run.last_row()["world_size"] == 2
    assert find_at_work(nodes.folder) == at_work
    if led_by == "the driver that created it":  # or Ray Train may still be forming its group
        assert set(agents) == set(find_agents(nodes.folder))
    assert "the coordinator was gone; its seat is taken again" in run.get_output(newest=True)
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()

    first, second = read_rows(run.dir.attempts)
    assert (first["end"], first["change"], first["world_size"]) == ("lost", "coordinator_lost", 2)
    assert first["last_step"] >= step
    # another coordinator needs seconds, in which the world trains on
    assert max(parse_utc(row["time_utc"]) for row in run.rows() if row["attempt"] == 1) > killed_s + 1
    assert (second["resumed_from"], second["end"]) == ("memory", "interrupted")
    assert second["first_step"] + second["lost_steps"] == first["last_step"] + 1
    (incident,) = read_rows(run.dir.incidents)
    assert (incident["kind"], incident["resumed_from"], incident["world"]) == ("coordinator_lost", "memory", "2 -> 2")
    assert incident["outage_s"] == pytest.approx(sum(incident["phases_s"].values()), abs=0.1)
    ledger = read_ledger(read_rows(run.dir.ledger))
    assert check_tiling(ledger) == []
    assert {row.node for row in ledger} == set(nodes.ids)

    unbroken = finish_both(run, last=run.last_row()["step"] + 5)
    assert read_samples(run.dir) == read_samples(unbroken)
    assert read_losses(run.dir) == pytest.approx(read_losses(unbroken), rel=1e-4)


def finish_both(run, *, last) -> RunDir:
    """Train the run to a step, and another one without any loss; return the other one."""
    unbroken = RunDir(run.storage / "unbroken")
    changes = [f"{key}={value}" for key, value in run.overrides.items() if key not in ("run", "train.steps")]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "elastic",
                run.storage / "tiny.yaml",
                *changes,
                f"run={name}",
                f"train.steps={last}",
            ],
            env=get_env(run.nodes.folder),
            cwd=run.storage,
        )
        for name in (run.dir.root.name, unbroken.root.name)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return unbroken


def test_coordinators_that_die_again_and_again_end_the_run_with_a_message_and_nothing_stays(run, nodes):
    run.start()
    run.wait_for_step(10, timeout_s=240)
    for _ in range(4):
        killed = kill_coordinator(run)
        wait_until(
            lambda killed=killed: run.driver.poll() is not None or find_coordinators(run) not in ([], [killed]),
            timeout_s=180,
            what="another coordinator, or the end",
        )

    assert run.wait(timeout_s=180) == 1
    assert re.search(r"the coordinator does not answer.*It has died 4 times within 10 minutes", run.get_output(), re.S)
    wait_until_gone(nodes, timeout_s=LEASE_S / 2 + 10)
