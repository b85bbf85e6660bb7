"""What the coordinator makes of what trainers say, with real records."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.controller import Policy, State
from cluster.runtime import messages as said
from cluster.runtime.coordinator.published import Published
from cluster.runtime.coordinator.records.run_records import open_run_records
from cluster.runtime.coordinator.world import World
from cluster.types import AttemptEnded, AttemptStarted, Event, Slot
from elastic.config import RunConfig
from elastic.ports import Progress
from elastic.records.rundir import format_utc, read_rows

SLOT = Slot("n", "cpu0")


@pytest.fixture
def heard(tmp_path):
    """A world of one trainer and the run records of its run."""
    records = open_run_records(str(tmp_path), RunConfig())
    policy = Policy(world_sizes=(1,), max_failures_without_progress=3)
    state = State(policy=policy, members=(SLOT,), attempt=1, stage="running")
    decided: list[Event] = []
    world = World(
        state, records=records, out=Published(), rows=SimpleNamespace(), disks="shared", decide=decided.append
    )
    return SimpleNamespace(world=world, state=state, records=records, decided=decided)


def begin(heard, attempt, at_s):
    heard.state.attempt = attempt
    heard.world.begin()
    heard.records.attempt_started(AttemptStarted(attempt=attempt, members=(SLOT,)), at_s)


def finish_step(heard, step, time_s):
    """As rank 0 says it; the coordinator hears of it whenever it does."""
    progress = Progress(step=step, tokens=10 * step)
    row = {"step": step, "time_utc": format_utc(time_s)}
    heard.world.hear(SLOT, heard.state.attempt, said.Stepped(progress=progress, row=row, phases=()))


def lose(heard, at_s):
    members, attempt = (SLOT,), heard.state.attempt
    over = {"attempt": attempt, "members": members, "change": "trainer_lost", "reason": "", "cause": None}
    heard.records.attempt_ended(AttemptEnded(**over, noticed_s=at_s), at_s)


def test_an_outage_lasts_from_step_to_step_however_late_the_coordinator_hears_of_them(heard):
    begin(heard, 1, 100.0)
    finish_step(heard, 1, 104.0)
    lose(heard, 104.5)
    begin(heard, 2, 105.0)
    finish_step(heard, 2, 107.5)
    (incident,) = read_rows(heard.records.run_dir.incidents)
    assert incident["outage_s"] == 3.5
    lose(heard, 108.0)
    assert [row["outage_s"] for row in read_rows(heard.records.run_dir.attempts)] == [0.0, 3.5]


def test_the_parts_of_an_outage_add_up_to_it_though_its_news_came_after_its_end(heard):
    begin(heard, 1, 100.0)
    finish_step(heard, 1, 104.0)
    lose(heard, 108.0)  # heard of when the next world had a step already
    begin(heard, 2, 108.5)
    heard.world.hear(SLOT, 2, said.Restored(progress=Progress(step=1, tokens=10), source="memory"))
    finish_step(heard, 2, 107.5)
    (incident,) = read_rows(heard.records.run_dir.incidents)
    assert incident["outage_s"] == 3.5
    assert sum(incident["phases_s"].values()) == pytest.approx(3.5)


def test_a_trainer_of_another_world_says_nothing(heard):
    begin(heard, 2, 100.0)
    for slot, attempt in ((SLOT, 1), (SLOT, None), (replace(SLOT, name="cpu1"), 2)):
        heard.world.hear(slot, attempt, said.Committed(progress=Progress(step=1, tokens=10)))
    assert heard.decided == []
    assert not heard.world.is_safe()
