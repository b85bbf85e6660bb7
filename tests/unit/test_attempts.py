from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.records.attempts import (
    History,
    build_row,
    close_torn_attempts,
    final_rows,
    next_attempt,
    read_history,
)
from elastic.records.rundir import RunDir, append_row, format_utc, parse_utc, read_rows


def put_metrics(run_dir, attempt, steps, *, from_s, world_size=2):
    for i, step in enumerate(steps, start=1):
        row = {"step": step, "attempt": attempt, "world_size": world_size, "step_s": 1.0}
        append_row(run_dir.metrics, {**row, "time_utc": format_utc(from_s + i)})


def row_of(history, **changed):
    known = {
        "attempt": 2,
        "world_size": 3,
        "nodes": ["a"],
        "start_s": 100.0,
        "end_s": 200.0,
        "end": "lost",
        "reason": "peer gone",
        "resumed_from": "disk",
        "resumed_step": 50,
        "last_step": 80,
        "first_step_s": 110.0,
    }
    return build_row(history, **{**known, **changed})


def test_a_rewind_costs_the_steps_since_the_state_it_started_from():
    row = row_of(History(attempt=1, step=57, last_step=57, last_step_s=95.5))
    assert (row.first_step, row.last_step, row.lost_steps, row.outage_s) == (51, 80, 7, 14.5)


def test_a_state_newer_than_the_newest_row_costs_no_steps():
    assert row_of(History(attempt=1, step=48, last_step=48, last_step_s=95.0)).lost_steps == 0


def test_the_first_attempt_has_neither_lost_steps_nor_outage():
    row = row_of(History(), resumed_step=0, resumed_from="scratch")
    assert (row.first_step, row.lost_steps, row.outage_s) == (1, 0, 0.0)


def test_an_attempt_without_a_step_was_an_outage_to_its_end():
    row = row_of(History(attempt=1, step=50, last_step=50, last_step_s=95.0), last_step=50, first_step_s=None)
    assert (row.first_step, row.last_step, row.lost_steps, row.outage_s) == (None, None, 0, 105.0)


def test_a_planned_change_right_after_a_loss_costs_no_steps_again():
    # killed at step 100, resumed from 69 and at 72 when a node joined: 31 steps were lost, once
    rewound = History(attempt=2, step=100, last_step=72, last_step_s=95.0)
    assert row_of(rewound, attempt=3, resumed_step=72, last_step=80).lost_steps == 0


def test_an_attempt_without_a_step_leaves_the_steps_to_do_again_to_the_next(tmp_path):
    before = History(attempt=1, step=57, last_step=57, last_step_s=95.0)
    assert row_of(before, last_step=50, first_step_s=None).lost_steps == 0
    assert row_of(before, attempt=3).lost_steps == 7


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=8))
def test_lost_steps_of_all_attempts_are_the_rows_that_were_written_again(attempts):
    history, written, lost, at = History(), 0, 0, 0
    for number, (rewind, steps) in enumerate(attempts, start=1):
        resumed = max(0, at - rewind) if number > 1 else 0
        row = row_of(history, attempt=number, resumed_step=resumed, last_step=resumed + steps)
        lost, written = lost + row.lost_steps, written + steps
        if steps:
            at = resumed + steps
            history = History(attempt=number, step=max(history.step, at), last_step=at, last_step_s=1.0)
    # every row beyond where training stands at the end was written again
    assert lost == written - at


def test_numbers_go_on_after_the_highest_that_either_file_knows(tmp_path):
    run_dir = RunDir(tmp_path)
    assert next_attempt(run_dir) == 1
    put_metrics(run_dir, 1, [1, 2], from_s=0)
    assert next_attempt(run_dir) == 2
    append_row(run_dir.attempts, asdict(row_of(History(), attempt=4)))
    assert next_attempt(run_dir) == 5


def test_killed_attempts_get_a_row_from_what_their_metrics_tell(tmp_path):
    run_dir = RunDir(tmp_path)
    put_metrics(run_dir, 1, range(1, 11), from_s=1000)  # steps end at 1001 .. 1010
    append_row(run_dir.attempts, asdict(row_of(History(), attempt=1)))
    put_metrics(run_dir, 2, range(6, 9), from_s=1020)
    put_metrics(run_dir, 3, range(6, 13), from_s=1040)
    with run_dir.attempts.open("a") as file:
        file.write('{"attempt": 2, "wor')

    close_torn_attempts(run_dir)
    close_torn_attempts(run_dir)  # a second call finds nothing to do

    _, second, third = read_rows(run_dir.attempts)
    assert (second["attempt"], second["first_step"], second["last_step"]) == (2, 6, 8)
    assert (second["end"], second["reason"]) == ("lost", "killed before it could say why")
    assert (second["lost_steps"], second["outage_s"]) == (5, 11.0)  # 10 - 5 steps; 1010 to 1021
    assert (parse_utc(second["start_utc"]), parse_utc(second["end_utc"])) == (1020.0, 1023.0)
    assert (third["lost_steps"], third["outage_s"], third["resumed_from"]) == (
        3,
        18.0,
        None,
    )  # 8 - 5: 9 and 10 are told
    assert read_history(run_dir) == History(attempt=3, step=12, last_step=12, last_step_s=1047.0)


def test_a_run_without_files_has_nothing_to_close(tmp_path):
    close_torn_attempts(RunDir(tmp_path))
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers())))
def test_the_last_row_of_a_step_wins(pairs):
    rows = final_rows({"step": step, "loss": loss, "attempt": 1} for step, loss in pairs)
    assert [(row["step"], row["loss"]) for row in rows] == sorted(dict(pairs).items())


def test_a_row_of_an_attempt_that_came_back_late_does_not_count():
    rows = [{"step": 5, "attempt": attempt, "loss": loss} for attempt, loss in [(1, 1.0), (2, 2.0), (2, 3.0), (1, 4.0)]]
    assert final_rows(rows) == [{"step": 5, "attempt": 2, "loss": 3.0}]


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_attempt_is_known_to_come_from_scratch_only_if_it_did_the_first_step(tmp_path, step):
    run_dir = RunDir(tmp_path)
    put_metrics(run_dir, 1, [step], from_s=0)
    close_torn_attempts(run_dir)
    (row,) = read_rows(run_dir.attempts)
    assert row["resumed_from"] == ("scratch" if step == 1 else None)


def test_a_killed_attempt_that_began_with_an_imported_model_did_not_come_from_scratch(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.origin.parent.mkdir()
    run_dir.origin.touch()
    put_metrics(run_dir, 1, [1], from_s=0)
    close_torn_attempts(run_dir)
    (row,) = read_rows(run_dir.attempts)
    assert row["resumed_from"] is None
