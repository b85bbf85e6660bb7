"""The demo shows what it promises, or says what has not come about."""

import pytest

from cluster.chaos.faults import Fault
from cluster.chaos.injector import Injector, Struck
from cluster.chaos.strikes import Schedule
from cluster.cli.demo import find_missing

KINDS = {"drain": "node_drained", "add": "node_added", "kill": "trainer_lost"}


def make_injector(*struck):
    injector = Injector(Schedule([]), None, drain=None, say=None)
    for fault in struck:
        name = str(Fault(fault=fault, at_step=45))
        injector.struck.append(Struck(fault=name, step=45, elapsed_s=60.0, phase="training", what=f"a {fault}"))
    return injector


def test_three_incidents_are_what_the_demo_promises():
    incidents = [{"kind": kind} for kind in KINDS.values()]
    assert find_missing(make_injector(*KINDS), incidents) == []


@pytest.mark.parametrize("fault", KINDS)
def test_what_was_begun_and_changed_no_world_is_told_with_its_step(fault):
    incidents = [{"kind": kind} for name, kind in KINDS.items() if name != fault] + [{"kind": "coordinator_lost"}]
    (line,) = find_missing(make_injector(*KINDS), incidents)
    assert f"at step 45 (a {fault}), but the run ended before its world had changed for it" in line
    assert "End what else runs here, or raise train.steps" in line


def test_what_was_never_begun_is_told():
    lines = find_missing(make_injector("drain"), [{"kind": "node_drained"}])
    assert [line.partition(":")[0] for line in lines] == ["a node that joins", "a trainer that is killed"]
    assert all("not begun before the run ended" in line for line in lines)


def test_a_node_that_joins_with_the_change_for_a_loss_has_joined():
    incidents = [{"kind": "node_drained", "world": "3 -> 2"}, {"kind": "trainer_lost", "world": "2 -> 3"}]
    assert find_missing(make_injector(*KINDS), incidents) == []
    (line,) = find_missing(make_injector(*KINDS), [incidents[0], {"kind": "trainer_lost", "world": "2 -> 2"}])
    assert line.startswith("a node that joins: ")
