"""The hand that strikes, on processes that are only there to be struck."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.chaos.faults import Fault, Target
from cluster.chaos.injector import Injector
from cluster.chaos.process_tree import find_family, is_of
from cluster.chaos.strikes import Schedule
from cluster.types import Scene, Slot, Worker

SLEEP = "import sys, time; sys.stdin.close(); time.sleep(60)"


class OneNode:
    """A cluster whose one node is a process with a child."""

    def __init__(self):
        self.nodes_by_index = ["a"]
        self.removed = []
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
        self.raylet = subprocess.Popen([sys.executable, "-c", code])

    def get_raylet(self, node):
        return self.raylet.pid

    def add_node(self):
        self.nodes_by_index.append("b")
        return "b"

    def remove_node(self, node):
        self.removed.append(node)
        self.nodes_by_index = [None if known == node else known for known in self.nodes_by_index]


@pytest.fixture
def cluster():
    cluster = OneNode()
    yield cluster
    for pid in find_family([cluster.raylet.pid]):
        os.kill(pid, signal.SIGKILL)
    cluster.raylet.wait()


@pytest.fixture
def trainer():
    process = subprocess.Popen([sys.executable, "-c", SLEEP, "cluster.runtime.node.host"], stdin=subprocess.PIPE)
    wait_for(lambda: is_of(process.pid, "cluster.runtime.node.host"))
    yield process
    process.kill()
    process.communicate()


def make_scene(pid, *, agent=0):
    return Scene(
        stage="running",
        attempt=1,
        step=5,
        attempt_step=5,
        world_size=1,
        workers=(Worker(rank=0, node="a", slot="cpu0", pid=pid),),
        agents={Slot("a", "cpu0"): agent},
        hosts={},
    )


def build(cluster, *faults, **hands):
    said = []
    return Injector(Schedule(faults), cluster, drain=hands.pop("drain", None), say=said.append, **hands), said


def get_state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition):
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_killed_trainer_is_dead_and_told(cluster, trainer):
    injector, said = build(cluster, Fault(fault="kill", at_step=5))
    injector.watch(make_scene(trainer.pid))
    assert trainer.wait(5) == -9
    assert said == ["fault: kill -9 of the trainer of rank 0 on node a"]
    assert [(s.fault, s.step, s.phase) for s in injector.struck] == [("kill random at_step=5", 5, "training")]


def test_a_process_that_is_no_trainer_any_more_is_spared_and_the_fault_waits(cluster):
    injector, said = build(cluster, Fault(fault="kill", at_step=5))
    injector.watch(make_scene(cluster.raylet.pid))
    assert cluster.raylet.poll() is None
    assert (said, len(injector.missed)) == ([], 1)


def test_who_has_just_gone_is_hit_before_what_comes_after(cluster):
    missing = Fault(fault="agent_kill", at_step=5)
    after, by_time = Fault(fault="add", at_step=5), Fault(fault="storage_slow", at_s=0)
    injector, said = build(cluster, missing, after, by_time, spoil_storage=lambda *_: None)
    injector.watch(make_scene(cluster.raylet.pid))
    assert cluster.nodes_by_index == ["a"], "the node that is added would change the world that was to be hit"
    assert injector.missed == [missing, after]
    assert len(said) == 1, "other stories go on"

    code = [sys.executable, "-c", SLEEP, "RayTrainWorker"]
    with subprocess.Popen(code, stdin=subprocess.PIPE) as agent:
        wait_for(lambda: is_of(agent.pid, "RayTrainWorker"))
        injector.watch(make_scene(cluster.raylet.pid, agent=agent.pid))
        assert agent.wait() == -signal.SIGKILL
    assert cluster.nodes_by_index == ["a", "b"]
    assert injector.is_done


def test_a_frozen_trainer_goes_on_when_its_time_is_up_or_the_injector_closes(cluster, trainer):
    for for_s in (0.05, 60):
        injector, _ = build(cluster, Fault(fault="freeze", at_step=5, for_s=for_s))
        injector.watch(make_scene(trainer.pid))
        wait_for(lambda: get_state(trainer.pid) == "T")
        if for_s > 1:
            injector.close()
        else:
            time.sleep(for_s)
            injector.act_due()
        wait_for(lambda: get_state(trainer.pid) != "T")


def test_a_frozen_node_stands_still_with_all_its_processes(cluster):
    wait_for(lambda: len(find_family([cluster.raylet.pid])) == 2)
    family = find_family([cluster.raylet.pid])
    injector, _ = build(cluster, Fault(fault="freeze", at_step=5, for_s=60, scope="node"))
    injector.watch(make_scene(0))
    wait_for(lambda: [get_state(pid) for pid in family] == ["T", "T"])
    injector.close()
    wait_for(lambda: "T" not in [get_state(pid) for pid in family])


def test_a_drained_node_is_told_its_deadline_and_gone_at_it(cluster):
    told = []
    fault = Fault(fault="drain", at_step=5, notice_s=0.05, target=Target(by="rank"))
    injector, _ = build(cluster, fault, drain=lambda node, deadline_s: told.append((node, deadline_s - time.time())))
    injector.watch(make_scene(0))
    assert told == [("a", pytest.approx(0.05, abs=0.03))]
    assert cluster.removed == []
    assert not injector.is_done
    time.sleep(0.06)
    injector.act_due()
    injector.act_due()
    assert cluster.removed == ["a"]
    assert injector.is_done


def test_a_node_whose_end_is_announced_is_not_hit_again(cluster):
    drains = [Fault(fault="drain", at_step=5, notice_s=60), Fault(fault="remove", at_step=5, phase="training")]
    told = []
    injector, _ = build(cluster, *drains, drain=lambda node, _: told.append(node))
    for _ in range(3):
        injector.watch(make_scene(0))
    cluster.add_node()
    injector.watch(make_scene(0))
    assert (told, cluster.removed) == (["a"], ["b"])


def test_a_node_comes_before_its_step_once_too_few_are_left(cluster):
    injector, said = build(cluster, Fault(fault="remove", at_step=5), Fault(fault="add", at_step=500))
    injector.watch(make_scene(0))
    injector.watch(make_scene(0))
    assert cluster.nodes_by_index == [None, "b"]
    assert said[-1] == "fault: node b joins, before step 500: too few nodes are left to reach it"
    assert injector.is_done


def test_times_count_from_the_first_step(cluster):
    injector, said = build(cluster, Fault(fault="add", at_s=0.05))
    assert injector.elapsed_s < 0
    injector.watch(make_scene(0))
    assert said == []
    assert injector.brings_nodes
    time.sleep(0.06)
    injector.watch(make_scene(0))
    assert said == ["fault: node b joins"]
    assert not injector.brings_nodes


def test_storage_is_spoilt_for_its_time(cluster):
    spoilt = []
    fault = Fault(fault="storage_full", at_step=5, for_s=3)
    injector, said = build(cluster, fault, spoil_storage=lambda fault, until_s: spoilt.append((fault, until_s)))
    injector.watch(make_scene(0))
    assert spoilt == [(fault, pytest.approx(time.time() + 3, abs=1))]
    assert said == ["fault: storage is full for 3 s"]


def test_what_was_struck_in_a_save_is_told_so(cluster):
    fault = Fault(fault="add", at_step=5, phase="saving")
    injector, _ = build(cluster, fault)
    injector.watch(make_scene(0))
    assert injector.missed == [fault]
    injector.watch(make_scene(0), is_saving=True)
    assert [struck.phase for struck in injector.struck] == ["saving"]
