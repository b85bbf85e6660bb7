"""Ray Train may take its time: who trains is left alone until a whole group of its agents does without them."""

import os
import signal
import time

import pytest

from cluster.runtime.messages import Claim
from cluster.runtime.node.connect import connect
from elastic.records.rundir import read_rows
from tests.ray._runs import Run
from tests.ray._traces import find_agents, find_at_work, find_processes, find_trainers, wait_until

pytestmark = pytest.mark.long

LEASE_S = 12.0
"""Half of it must do for a driver on a busy machine."""


@pytest.fixture(scope="module")
def running(nodes, data, tmp_path_factory):
    """A run at work on three nodes."""
    settings = {"train.steps": 100_000, "checkpoint.every_steps": 1000, "fault.lease_s": LEASE_S}
    run = Run(nodes, data, tmp_path_factory.mktemp("run"), **settings)
    run.start()
    run.wait_for_step(10, world_size=3, timeout_s=240)
    yield run
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()


def test_whoever_trains_goes_on_for_as_long_as_ray_train_takes_to_form_its_group_again(running):
    nodes = running.nodes
    at_work = find_at_work(nodes.folder)
    assert [len(pids) for pids in at_work] == [3, 3, 3]
    agents = wait_until(lambda: find_agents(nodes.folder), timeout_s=20, what="agents")
    (train,) = [pid for pid, command in find_processes(nodes.folder).items() if "ray::TrainController" in command]
    os.kill(train, signal.SIGSTOP)
    try:
        for agent in agents:
            os.kill(agent, signal.SIGKILL)
        time.sleep(2 * LEASE_S)
        assert not find_agents(nodes.folder)  # else it was no test
        running.wait_for_step(running.last_row()["step"] + 20)
    finally:
        os.kill(train, signal.SIGCONT)
    wait_until(lambda: len(find_agents(nodes.folder)) == 3, timeout_s=240, what="another group")
    running.wait_for_step(running.last_row()["step"] + 20)
    assert find_at_work(nodes.folder) == at_work
    assert {row["attempt"] for row in running.rows()} == {1}
    assert list(read_rows(running.dir.incidents)) == []


def test_a_slot_that_a_whole_group_has_left_out_ends_after_the_lease_and_nobody_else_does(running):
    """An agent of an older group takes it late, and ends."""
    nodes = running.nodes
    at_work = find_at_work(nodes.folder)
    agent = connect(next(nodes.folder.glob("solvent-*")))
    agent.send(Claim(group=0, group_size=3, pid=os.getpid(), slot="cpu9", env={}))
    wait_until(lambda: len(find_trainers(nodes.folder)) == 4, timeout_s=20, what="a trainer of its own")
    time.sleep(LEASE_S + 2)
    assert len(find_trainers(nodes.folder)) == 4  # its agent lives
    agent.close()
    start_s = time.monotonic()
    wait_until(lambda: len(find_trainers(nodes.folder)) == 3, timeout_s=LEASE_S + 10, what="the end of its trainer")
    assert time.monotonic() - start_s > LEASE_S - 2  # the last renewal may have been before
    running.wait_for_step(running.last_row()["step"] + 20)
    assert find_at_work(nodes.folder) == at_work
    assert {row["attempt"] for row in running.rows()} == {1}
