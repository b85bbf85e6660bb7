"""Agents, the processes that Ray Train counts and restarts, are light, and training does not depend on them."""

import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.runtime.node.priority import get_ahead
from elastic.records.rundir import parse_utc
from tests.ray._runs import Run
from tests.ray._traces import find_agents, find_hosts, find_processes, find_trainers, wait_until


@pytest.fixture(scope="module")
def running(nodes, data, tmp_path_factory):
    """A run at work on three nodes."""
    run = Run(nodes, data, tmp_path_factory.mktemp("run"), **{"train.steps": 100_000, "checkpoint.every_steps": 1000})
    run.start()
    run.wait_for_step(10, world_size=3, timeout_s=240)
    yield run
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()


def has_mapped(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


def test_agents_and_the_coordinator_carry_no_torch(running):
    agents = wait_until(lambda: find_agents(running.nodes.folder), timeout_s=20, what="agents")
    coordinators = [pid for pid, c in find_processes(running.nodes.folder).items() if "ray::Coordinator" in c]
    assert (len(agents), len(coordinators)) == (3, 1)
    assert not any(has_mapped(pid, "libtorch") for pid in agents + coordinators)
    assert all(has_mapped(pid, "libtorch") for pid in find_trainers(running.nodes.folder))  # the look itself works


def test_ray_starts_no_process_for_a_worker_group_that_nothing_here_uses(running):
    commands = " ".join(find_processes(running.nodes.folder).values())
    assert "ray::RayTrainWorker" in commands  # the look itself works
    assert not re.search(r"ray::(DatasetManager|PreemptionWatcher)", commands)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be less nice than Ray's workers")
def test_trainers_go_ahead_of_the_raylet_which_is_as_nice_as_who_decides_and_agents_are_nicer(running):
    def get_niceness(pids):
        return {os.getpriority(os.PRIO_PROCESS, pid) for pid in pids}

    folder, raylets = running.nodes.folder, [running.nodes.get_raylet(node) for node in running.nodes.ids]
    words = Path(f"/proc/{raylets[0]}/environ").read_bytes().decode().split("\0")
    ahead = get_ahead(dict(word.split("=", 1) for word in words if "=" in word))
    assert ahead > 0
    deciding = [pid for pid, c in find_processes(folder).items() if "ray::Coordinator" in c or "ray::WatchActor" in c]
    (of_raylets,) = get_niceness(raylets)
    assert get_niceness(deciding) == {of_raylets}
    assert get_niceness(find_trainers(folder) + find_hosts(folder)) == {of_raylets - ahead}
    assert min(get_niceness(find_agents(folder))) > of_raylets


@pytest.mark.parametrize("library", ["_raylet.so", "/pandas/"])
def test_hosts_and_trainers_carry_neither_ray_nor_pandas(running, library):
    pids = find_hosts(running.nodes.folder) + find_trainers(running.nodes.folder)
    assert not any(has_mapped(pid, library) for pid in pids)


def test_an_agent_that_is_killed_changes_no_world_and_is_replaced(running):
    trainers, agents = find_trainers(running.nodes.folder), find_agents(running.nodes.folder)
    step = running.last_row()["step"]
    os.kill(agents[0], signal.SIGKILL)

    # Ray Train ends all its workers and starts others
    running.wait_for(
        lambda: not set(agents) & set(find_agents(running.nodes.folder)), timeout_s=180, what="old agents end"
    )
    running.wait_for(lambda: len(find_agents(running.nodes.folder)) == 3, timeout_s=180, what="new agents")
    time.sleep(3)  # they claim
    running.wait_for_step(running.last_row()["step"] + 10)

    assert find_trainers(running.nodes.folder) == trainers
    rows = [row for row in running.rows() if row["step"] > step]
    assert {(row["attempt"], row["world_size"]) for row in rows} == {(1, 3)}
    gaps_s = [parse_utc(b["time_utc"]) - parse_utc(a["time_utc"]) for a, b in pairwise(rows)]
    assert max(gaps_s) < 3  # Ray's new workers take the processors, nothing else holds training up


def test_a_trainer_that_is_killed_is_replaced_without_ray_noticing(running):
    agents, trainers = find_agents(running.nodes.folder), find_trainers(running.nodes.folder)
    running.wait_for_step(running.last_row()["step"] + 5, world_size=3)
    os.kill(trainers[0], signal.SIGKILL)
    running.wait_for(lambda: running.last_row()["attempt"] == 2, what="the next attempt")
    assert running.last_row()["world_size"] == 3
    assert find_agents(running.nodes.folder) == agents
    told = re.compile(r"attempt 1 lost: trainer ended with signal 9 \(SIGKILL\) \(node \w+\)")
    running.wait_for(lambda: told.search(running.get_output()), what="the driver, which polls, to say so")


def test_a_host_that_is_killed_is_replaced_on_its_node(running):
    hosts = find_hosts(running.nodes.folder)
    os.kill(hosts[0], signal.SIGKILL)
    running.wait_for(lambda: running.last_row()["world_size"] == 2, what="the others go on")
    running.wait_for(lambda: running.last_row()["world_size"] == 3, timeout_s=240, what="its node is back")
    assert len(find_hosts(running.nodes.folder)) == 3
