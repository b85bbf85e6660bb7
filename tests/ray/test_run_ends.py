"""Runs that cannot go on end with the reason, and nothing of them stays."""

import re
import signal

import pytest

from elastic.records.rundir import read_rows
from tests.ray._drivers import find_coordinators, kill_coordinator, wait_until_gone
from tests.ray._nodes import open_nodes
from tests.ray._runs import Run
from tests.ray._traces import find_agents, find_at_work, wait_until

LEASE_S = 30


@pytest.fixture(scope="module")
def nodes():
    """Two: each start of a run warms all of them up, and the machine has two cores."""
    with open_nodes(2) as nodes:
        yield nodes


@pytest.fixture
def run(nodes, data, tmp_path):
    settings = {"train.steps": 100_000, "fault.lease_s": LEASE_S, "checkpoint.every_steps": 1000}
    run = Run(nodes, data, tmp_path, **settings)
    yield run
    if run.driver and run.driver.poll() is None:
        run.driver.send_signal(signal.SIGINT)
        run.wait()
    wait_until_gone(nodes)


def test_what_makes_trainers_fail_ends_the_run_with_their_reason(run, nodes):
    run.start(**{"optim.lr": 1e30})  # weights overflow, and the loss of the next step is not finite

    assert run.wait() == 1, run.get_output()
    wait_until_gone(nodes)
    assert "lower optim.lr" in run.get_output()
    assert [row["end"] for row in read_rows(run.dir.attempts)] == ["failed"]


def test_coordinators_that_die_again_and_again_end_the_run_with_a_message_and_nothing_stays(run, nodes):
    run.start()
    run.wait_for_step(10, world_size=2, timeout_s=240)
    wait_until(lambda: len(find_agents(nodes.folder)) == 2, timeout_s=60, what="Ray Train has formed its group")
    at_work, agents = find_at_work(nodes.folder), find_agents(nodes.folder)
    for number in range(1, 5):
        killed = kill_coordinator(run)
        wait_until(
            lambda killed=killed: run.driver.poll() is not None or find_coordinators(run) not in ([], [killed]),
            timeout_s=180,
            what="another coordinator, or the end",
        )
        if number == 1:
            run.wait_for(lambda: run.last_row()["attempt"] == 2, what="the world of another coordinator")
            assert find_at_work(nodes.folder) == at_work
            assert find_agents(nodes.folder) == agents

    assert run.wait(timeout_s=180) == 1
    assert re.search(r"the coordinator does not answer.*It has died 4 times within 10 minutes", run.get_output(), re.S)
    wait_until_gone(nodes, timeout_s=LEASE_S / 2 + 10)
