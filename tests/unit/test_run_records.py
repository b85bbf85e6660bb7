"""The records alone, without a cluster."""

import pytest

from cluster.controller import Policy, State
from cluster.ledger import check_tiling, read_ledger
from cluster.runtime.coordinator.records.run_records import open_run_records
from cluster.types import DRIVER_GONE, AttemptEnded, AttemptStarted, Slot
from elastic.config import RunConfig
from elastic.ports import Progress
from elastic.records.rundir import RunDir, append_row, format_utc, read_rows


@pytest.mark.parametrize("stage", ["clearing", "waiting", "forming"])
def test_a_lost_node_is_idle_though_it_is_a_member_of_the_world_that_ends(tmp_path, stage):
    records = open_run_records(str(tmp_path), RunConfig())
    for name in ("lost", "survivor"):
        records.join(name, 0.0, gpus=1, usd_per_gpu_hour=0.0)
    policy = Policy(world_sizes=(1, 2), max_failures_without_progress=3)
    members = (Slot("lost", "cpu0"), Slot("survivor", "cpu0"))
    state = State(policy=policy, members=members, claims=dict.fromkeys(members, 1), stage="running")
    records.staged(state, 1.0)

    records.host_gone("lost", 2.0)
    del state.claims[members[0]]
    state.stage = stage
    records.staged(state, 2.0)
    records.close(3.0)

    states = {row["node"]: row["state"] for row in read_rows(records.run_dir.ledger)}
    assert states["lost"] == "idle"
    assert states["survivor"] != "idle"


def write_step(run_dir, step, time_s, attempt=1):
    """As rank 0 of an attempt does, each second."""
    time_utc = format_utc(time_s)
    row = {"step": step, "tokens": 10 * step, "attempt": attempt, "world_size": 2, "step_s": 1.0, "time_utc": time_utc}
    append_row(run_dir.metrics, row)


def test_a_coordinator_that_follows_a_dead_one_books_the_steps_that_were_done_without_any(tmp_path):
    run_dir = RunDir(tmp_path)
    first = open_run_records(str(tmp_path), RunConfig())
    first.join("n", 100.0, gpus=2, usd_per_gpu_hour=0.0)
    for step in (1, 2):
        write_step(run_dir, step, 101.0 + step)
    first.flush(110.0)  # up to 105 s; what came after died with it

    second = open_run_records(str(tmp_path), RunConfig(), lost_s=110.5)
    second.join("n", 111.0, gpus=2, usd_per_gpu_hour=0.0)
    write_step(run_dir, 3, 112.0)  # the world is not over yet
    members = (Slot("n", "cpu0"),)
    second.record_inherited(second.fetch_inherited(), 113.0)
    second.attempt_started(AttemptStarted(attempt=2, members=members), 113.0)
    second.restored(members[0], Progress(step=1, tokens=10), "memory", 114.0)
    second.stepped(members[0], Progress(step=2, tokens=20), [], 115.0)
    second.close(116.0)

    (torn,) = read_rows(run_dir.attempts)
    assert (torn["attempt"], torn["end"], torn["change"], torn["last_step"]) == (1, "lost", "coordinator_lost", 3)
    (incident,) = read_rows(run_dir.incidents)
    assert (incident["kind"], incident["world"], incident["resumed_from"]) == ("coordinator_lost", "2 -> 1", "memory")
    # 3 steps were done and 1 was in memory; from the row of step 3 to that of step 2 anew
    assert (incident["detected_s"], incident["lost_steps"], incident["outage_s"]) == (110.5, 2, 3.0)
    assert sum(incident["phases_s"].values()) == pytest.approx(3.0)
    tiles = read_ledger(read_rows(run_dir.ledger))
    assert check_tiling(tiles) == []
    assert (tiles[0].start_ms, tiles[-1].end_ms) == (100_000, 116_000)


def train_attempt(records, attempt, change, *, resumed, last):
    """An attempt of one trainer that applies a step a second and then ends."""
    members, at_s = (Slot("n", "cpu0"),), 1000.0 * attempt
    records.attempt_started(AttemptStarted(attempt=attempt, members=members), at_s)
    records.restored(members[0], Progress(step=resumed, tokens=10 * resumed), "memory", at_s)
    for step in range(resumed + 1, last + 1):
        records.stepped(members[0], Progress(step=step, tokens=10 * step), [], at_s + step)
    over = {"attempt": attempt, "members": members, "change": change, "reason": "", "cause": None}
    records.attempt_ended(AttemptEnded(**over, noticed_s=at_s + last), at_s + last)


def test_an_incident_counts_the_steps_that_it_lost_and_not_those_of_the_one_before(tmp_path):
    records = open_run_records(str(tmp_path), RunConfig())
    train_attempt(records, 1, "trainer_lost", resumed=0, last=100)
    train_attempt(records, 2, "trainer_lost", resumed=69, last=69)  # dies before its first step
    train_attempt(records, 3, "node_added", resumed=69, last=72)
    train_attempt(records, 4, "finished", resumed=72, last=120)
    assert [row["lost_steps"] for row in read_rows(records.run_dir.incidents)] == [31, 0]
    assert [row["lost_steps"] for row in read_rows(records.run_dir.attempts)] == [0, 0, 31, 0]


def test_a_coordinator_that_died_before_any_world_leaves_nothing_to_book(tmp_path):
    records = open_run_records(str(tmp_path), RunConfig(), lost_s=10.0)
    records.record_inherited(records.fetch_inherited(), 11.0)
    records.attempt_started(AttemptStarted(attempt=2, members=(Slot("n", "cpu0"),)), 11.0)
    records.restored(Slot("n", "cpu0"), Progress(), "scratch", 12.0)
    records.stepped(Slot("n", "cpu0"), Progress(step=1, tokens=10), [], 13.0)
    assert not list(read_rows(records.run_dir.incidents))
    assert not list(read_rows(records.run_dir.attempts))


def resume(run_dir, *, at_s, attempt=2):
    """Form the world of a next driver on another cluster, up to its first step; then that one is lost as well."""
    records = open_run_records(str(run_dir.root), RunConfig())
    records.join("m", at_s, gpus=1, usd_per_gpu_hour=0.0)
    members = (Slot("m", "cpu0"),)
    records.attempt_started(AttemptStarted(attempt=attempt, members=members), at_s + 1)
    records.restored(members[0], Progress(step=1, tokens=10), "disk", at_s + 2)
    write_step(run_dir, 2, at_s + 3, attempt=attempt)
    records.stepped(members[0], Progress(step=2, tokens=20), [], at_s + 3)


def test_the_loss_of_a_head_with_all_that_knew_of_it_is_an_incident_with_its_outage(tmp_path):
    run_dir = RunDir(tmp_path)
    records = open_run_records(str(tmp_path), RunConfig())
    records.attempt_started(AttemptStarted(attempt=1, members=(Slot("n", "cpu0"), Slot("n", "cpu1"))), 100.0)
    for step in (1, 2, 3):
        write_step(run_dir, step, 101.0 + step)  # the last at 104 s; then the head is gone
    resume(run_dir, at_s=140.0)
    assert [row["change"] for row in read_rows(run_dir.attempts)] == ["head_lost"]
    (incident,) = read_rows(run_dir.incidents)
    assert (incident["kind"], incident["world"], incident["lost_steps"]) == ("head_lost", "2 -> 1", 2)
    assert incident["outage_s"] == 143.0 - 104.0
    resume(run_dir, at_s=200.0, attempt=3)
    assert [row["outage_s"] for row in read_rows(run_dir.incidents)] == [39.0, 60.0]


def test_the_loss_of_a_driver_is_an_incident_with_its_outage(tmp_path):
    run_dir = RunDir(tmp_path)
    members = (Slot("n", "cpu0"),)
    records = open_run_records(str(tmp_path), RunConfig())
    records.attempt_started(AttemptStarted(attempt=1, members=members), 100.0)
    records.restored(members[0], Progress(), "scratch", 101.0)
    write_step(run_dir, 1, 104.0)
    records.stepped(members[0], Progress(step=1, tokens=10), [], 104.0)
    ended = AttemptEnded(attempt=1, members=members, change="stopped", reason=DRIVER_GONE, cause=None, noticed_s=110.0)
    records.attempt_ended(ended, 111.0)
    records.close(112.0)
    resume(run_dir, at_s=140.0)
    (incident,) = read_rows(run_dir.incidents)
    assert (incident["kind"], incident["lost_steps"], incident["outage_s"]) == ("driver_lost", 0, 143.0 - 104.0)


def test_a_run_that_somebody_ended_on_purpose_has_no_incident(tmp_path):
    run_dir = RunDir(tmp_path)
    members = (Slot("n", "cpu0"),)
    records = open_run_records(str(tmp_path), RunConfig())
    records.attempt_started(AttemptStarted(attempt=1, members=members), 100.0)
    records.stepped(members[0], Progress(step=1, tokens=10), [], 104.0)
    reason = "interrupted from the keyboard"
    ended = AttemptEnded(attempt=1, members=members, change="stopped", reason=reason, cause=None, noticed_s=110.0)
    records.attempt_ended(ended, 111.0)
    records.close(112.0)
    resume(run_dir, at_s=140.0)
    assert not list(read_rows(run_dir.incidents))


def test_steps_that_a_node_tells_together_are_booked_one_by_one(tmp_path):
    for step in (1, 2):
        write_step(RunDir(tmp_path), step, float(step))
    records = open_run_records(str(tmp_path), RunConfig())
    for node in ("a", "b"):
        records.join(node, 10.0, gpus=1, usd_per_gpu_hour=0.0)
    members = (Slot("a", "cpu0"), Slot("b", "cpu0"))
    records.attempt_started(AttemptStarted(attempt=2, members=members), 10.0)
    for step in (1, 2, 3, 4):
        end_s = 10.0 + step
        records.step_times(members[1], step, [("train", end_s - 1, end_s)])
    records.close(20.0)
    rows = [row for row in read_ledger(read_rows(records.run_dir.ledger)) if row.node == "b"]
    assert check_tiling(rows) == []
    tiles = [(row.state, row.start_ms, row.end_ms) for row in rows]
    assert tiles == [("redo", 10_000, 12_000), ("train", 12_000, 20_000)]  # steps 1 and 2 had been done before
