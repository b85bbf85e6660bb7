"""Which faults strike when and whom, over seen scenes that are made up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chaos.faults import KINDS, NODE_FAULTS, PHASES, TRAINER_FAULTS, Fault, Target
from cluster.chaos.strikes import Schedule, get_phase
from cluster.types import Scene, Worker

NODES = ["a", "b", "c"]


def make_scene(*, stage="running", attempt=1, step=10, attempt_step=10, nodes=("a", "b", "c"), known=None):
    workers = tuple(Worker(rank=rank, node=node, slot="cpu0", pid=100 + rank) for rank, node in enumerate(nodes))
    return Scene(
        stage=stage,
        attempt=attempt,
        step=step,
        attempt_step=attempt_step,
        world_size=len(workers),
        workers=workers if known is None else workers[:known],
        agents={},
        hosts={},
    )


def take(schedule, scene, *, nodes=NODES, elapsed_s=0.0, is_saving=False):
    return schedule.take_due(scene, nodes=nodes, elapsed_s=elapsed_s, is_saving=is_saving)


@pytest.mark.parametrize(
    ("stage", "attempt_step", "is_saving", "phase"),
    [
        ("waiting", 0, False, None),
        ("forming", 0, True, "starting"),
        ("running", 0, True, "starting"),
        ("running", 5, False, "training"),
        ("running", 5, True, "saving"),
        ("parking", 5, True, "saving"),
        ("clearing", 5, True, None),
    ],
)
def test_a_phase_follows_from_the_stage_the_first_step_and_the_save(stage, attempt_step, is_saving, phase):
    assert get_phase(make_scene(stage=stage, attempt_step=attempt_step), is_saving=is_saving) == phase


def test_a_fault_strikes_once_at_its_step():
    schedule = Schedule([Fault(fault="add", at_step=10)])
    assert take(schedule, make_scene(step=9)) == []
    assert [s.fault.fault for s in take(schedule, make_scene(step=10))] == ["add"]
    assert take(schedule, make_scene(step=11)) == []
    assert schedule.waiting == []


def test_faults_of_one_step_strike_together_and_hit_different_nodes():
    schedule = Schedule([Fault(fault="drain", at_step=10) for _ in range(3)])
    assert {strike.node for strike in take(schedule, make_scene())} == {"a", "b", "c"}


def test_the_node_of_a_rank_and_the_node_of_an_index_are_hit():
    by_rank = Schedule([Fault(fault="drain", at_step=0, target=Target(by="rank", index=1))])
    assert take(by_rank, make_scene(nodes=("c", "b", "a")))[0].node == "b"
    by_index = Schedule([Fault(fault="kill", at_step=0, target=Target(by="node", index=2))])
    assert take(by_index, make_scene(nodes=("c", "b", "a")))[0].worker.rank == 0


def test_who_is_gone_is_replaced_by_one_who_is_there():
    node_1 = Fault(fault="remove", at_step=0, target=Target(by="node", index=1))
    assert take(Schedule([node_1]), make_scene(nodes=("a", "c")), nodes=["a", None, "c"])[0].node == "c"
    rank_2 = Fault(fault="kill", at_step=0, target=Target(by="rank", index=2))
    assert take(Schedule([rank_2]), make_scene(nodes=("a", "b")))[0].worker.rank == 0


def test_a_trainer_that_has_not_said_who_it_is_is_waited_for():
    schedule = Schedule([Fault(fault="kill", at_step=0, phase="starting", target=Target(by="rank", index=2))])
    forming = make_scene(stage="forming", attempt_step=0)
    assert take(schedule, replace(forming, workers=forming.workers[:2])) == []
    assert take(schedule, forming)[0].worker.rank == 2


def test_one_that_waits_for_a_world_size_holds_up_those_behind_it():
    schedule = Schedule([Fault(fault="add", at_step=5, at_world_size=2), Fault(fault="remove", at_step=6)])
    assert take(schedule, make_scene(step=8)) == []
    assert [s.fault.fault for s in take(schedule, make_scene(step=8, nodes=("a", "b")))] == ["add", "remove"]


def test_one_that_waits_for_a_start_does_not_hold_up_the_one_that_brings_it():
    schedule = Schedule([Fault(fault="kill", at_step=5, phase="starting"), Fault(fault="remove", at_step=6)])
    assert schedule.waits_for_moment(step=5, elapsed_s=0)
    assert [s.fault.fault for s in take(schedule, make_scene(step=8))] == ["remove"]
    assert [s.fault.fault for s in take(schedule, make_scene(stage="forming", attempt_step=0))] == ["kill"]


@pytest.mark.parametrize(("companion", "passes"), [("kill", False), ("storage_slow", True)])
def test_one_that_waits_for_a_start_holds_up_later_ones_if_its_own_moment_brings_it(companion, passes):
    starting = Fault(fault="add", at_step=5, phase="starting")
    schedule = Schedule([Fault(fault=companion, at_step=5), starting, Fault(fault="remove", at_step=6)])
    struck = [s.fault.fault for s in take(schedule, make_scene(step=8))]
    assert struck == [companion, *(["remove"] if passes else [])]
    left = [s.fault.fault for s in take(schedule, make_scene(step=8, stage="forming", attempt_step=0))]
    assert left == ["add", *([] if passes else ["remove"])]


def test_a_start_that_nobody_saw_holds_up_nothing():
    planned = [
        Fault(fault="remove", at_step=10),
        Fault(fault="agent_kill", at_step=10, phase="starting"),
        Fault(fault="add", at_step=20),
    ]
    schedule = Schedule(planned)
    assert [s.fault.fault for s in take(schedule, make_scene(step=30))] == ["remove"]
    assert take(schedule, make_scene(step=31)) == [], "the old world is still at work"
    assert take(schedule, make_scene(step=31, attempt=2, stage="clearing")) == []
    assert [s.fault.fault for s in take(schedule, make_scene(step=33, attempt=2, attempt_step=2))] == ["add"]
    assert schedule.waiting == [planned[1]]
    forming = make_scene(step=40, attempt=3, attempt_step=0, stage="forming")
    assert [s.fault.fault for s in take(schedule, forming)] == ["agent_kill"]


def test_one_that_was_missed_is_first_again_and_hits_the_same():
    schedule = Schedule([Fault(fault="kill", at_step=5), Fault(fault="add", at_step=50)])
    (strike,) = take(schedule, make_scene())
    schedule.put_back(strike)
    assert take(schedule, make_scene()) == [strike]


def rescue(schedule, *, step=40, elapsed_s=0.0):
    scene = make_scene(stage="waiting", step=step, nodes=())
    strikes = schedule.take_due(scene, nodes=[None], elapsed_s=elapsed_s, is_saving=False, lacks_nodes=True)
    return [strike.fault for strike in strikes]


def test_a_node_whose_step_cannot_be_reached_any_more_comes_at_once_and_only_one():
    kill, first, second = (
        Fault(fault="kill", at_step=60),
        Fault(fault="add", at_step=80),
        Fault(fault="add", at_step=90),
    )
    schedule = Schedule([kill, first, second])
    assert rescue(schedule) == [first]
    assert schedule.waiting == [kill, second]
    assert take(schedule, make_scene(step=59)) == []  # a node has come; the others keep their steps


def test_a_node_that_time_brings_is_waited_for_though_the_one_before_it_has_nobody_to_hit():
    kill, timed, stepped = Fault(fault="kill", at_s=10), Fault(fault="add", at_s=20), Fault(fault="add", at_step=80)
    schedule = Schedule([kill, timed, stepped])
    assert rescue(schedule, elapsed_s=19) == []
    assert rescue(schedule, elapsed_s=20) == [timed]
    assert schedule.waiting == [stepped, kill]


def test_without_a_node_to_come_nothing_changes():
    schedule = Schedule([Fault(fault="kill", at_step=10)])
    assert rescue(schedule) == []
    assert len(schedule.waiting) == 1


faults = st.builds(
    Fault,
    fault=st.sampled_from(KINDS),
    at_step=st.integers(0, 30),
    phase=st.sampled_from([None, *PHASES]),
    at_world_size=st.sampled_from([None, 1, 2, 3]),
    target=st.builds(Target, by=st.sampled_from(["rank", "node", "random"]), index=st.integers(0, 5)),
    seed=st.integers(0, 3),
)


@st.composite
def scenes(draw):
    nodes = draw(st.lists(st.sampled_from(NODES), min_size=0, max_size=3))
    known = draw(st.integers(0, len(nodes)))
    stage = draw(st.sampled_from(["waiting", "forming", "running", "parking", "clearing", "done"]))
    return make_scene(
        stage=stage, step=draw(st.integers(0, 30)), attempt_step=draw(st.integers(0, 3)), nodes=nodes, known=known
    )


@given(
    st.lists(faults, max_size=8),
    st.lists(st.tuples(scenes(), st.lists(st.sampled_from([*NODES, None]), unique=True), st.booleans()), max_size=12),
)
def test_whatever_is_seen_each_fault_strikes_at_most_once_and_only_those_who_are_there(planned, seen):
    first, second = Schedule(planned), Schedule(planned)
    struck = []
    for scene, nodes, is_saving in seen:
        strikes = take(first, scene, nodes=nodes, is_saving=is_saving)
        assert strikes == take(second, scene, nodes=nodes, is_saving=is_saving)  # the same again: only seeds decide
        for strike in strikes:
            assert scene.step >= strike.fault.at_step
            assert strike.fault.phase in (None, get_phase(scene, is_saving=is_saving))
            assert strike.node is None or strike.node in nodes
            assert (strike.worker is not None) == (strike.fault.fault in TRAINER_FAULTS)
            assert strike.worker is None or strike.worker in scene.workers
            assert (strike.node is not None) == (strike.fault.fault in (*TRAINER_FAULTS, *NODE_FAULTS))
        struck += [strike.number for strike in strikes]
    assert len(struck) == len(set(struck))
    assert len(struck) + len(first.waiting) == len(planned)
