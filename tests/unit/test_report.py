import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger import STATES, Ledger, LedgerRow
from cluster.report.curves import build_curves
from cluster.report.page import build_report
from cluster.report.status import get_status
from cluster.report.story import read_story
from elastic.records.rundir import RunDir, append_row, format_utc, read_rows

TRAIN, SAVE = STATES.index("train"), STATES.index("save")


def put_steps(run_dir, steps, *, attempt=1, from_s=1000.0, world_size=2):
    for i, step in enumerate(steps, start=1):
        row = {"step": step, "tokens": 100 * step, "loss": 5.0 - 0.01 * step, "step_s": 2.0, "tokens_per_s": 50.0}
        row |= {"mfu": None, "world_size": world_size, "attempt": attempt, "time_utc": format_utc(from_s + 2 * i)}
        append_row(run_dir.metrics, row)


def put_end(run_dir, attempt, end):
    row = {"attempt": attempt, "world_size": 2, "start_utc": format_utc(1000), "end_utc": format_utc(1200), "end": end}
    row |= {"first_step": 1, "last_step": 2, "reason": "", "resumed_from": None, "lost_steps": 3, "outage_s": 1.0}
    append_row(run_dir.attempts, row)


def put_ledger(run_dir, *, end_s=1100.0):
    ledger = Ledger()
    ledger.join("a", 1000.0, gpus=1, usd_per_gpu_hour=36.0)  # a cent a second
    ledger.report("a", "train", 1020.0, end_s)
    for row in ledger.flush(end_s):
        append_row(run_dir.ledger, row.to_row())


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "r1")
    run_dir.root.mkdir()
    run_dir.config.write_text("train: {steps: 50}\n")
    return run_dir


def test_steps_that_were_not_applied_are_counted_once_and_shown(run_dir):
    put_steps(run_dir, range(1, 5))
    bad = {**list(read_rows(run_dir.metrics))[-1], "loss": math.nan, "bad_step": "not_finite"}
    for attempt in (1, 2):  # the second attempt met it again
        append_row(run_dir.metrics, {**bad, "step": 5, "attempt": attempt})
    assert get_status(run_dir, now_s=1101.0)["bad_steps"] == 1
    assert ", 1 not applied" in build_report(run_dir).read_text()


def test_a_running_run_tells_its_pace_and_its_price(run_dir):
    put_steps(run_dir, range(1, 41))  # the last one ends at 1080
    put_ledger(run_dir)
    status = get_status(run_dir, now_s=1101.0)
    assert (status["run"], status["state"], status["step"], status["total_steps"]) == ("r1", "running", 40, 50)
    assert status["eta_s"] == 20.0  # 10 steps of 2 s
    assert status["usd"] == pytest.approx(1.0)  # 100 s
    assert status["usd_per_mtoken"] == pytest.approx(250.0)  # a dollar for 4000 tokens
    assert status["goodput"] == 0.8
    assert status["last_update_age_s"] == pytest.approx(1.0)
    assert json.loads(json.dumps(status)) == status


def test_the_failures_of_all_submissions_count_against_one_budget(run_dir):
    run_dir.config.write_text("fault: {max_failures_without_progress: 3}")
    status = get_status(run_dir, now_s=0.0)
    assert (status["failures_without_progress"], status["failures_left"], status["denied_nodes"]) == (0, 3, [])
    for last_step, change, denied in [(9, "finished", None), (9, "trainer_lost", None), (5, "trainer_lost", "b")]:
        row = {"attempt": 1, "last_step": last_step, "end": "lost", "end_utc": format_utc(0)}
        append_row(run_dir.attempts, {**row, "change": change, "cause": "b", "denied": denied})
    status = get_status(run_dir, now_s=0.0)
    assert (status["failures_without_progress"], status["failures_left"], status["denied_nodes"]) == (2, 1, ["b"])


@pytest.mark.parametrize(("now_s", "state"), [(1140.0, "running"), (1141.0, "silent")])
def test_a_run_not_heard_of_for_two_minutes_is_silent(run_dir, now_s, state):
    put_steps(run_dir, range(1, 11))  # the last one ends at 1020
    assert get_status(run_dir, now_s=now_s)["state"] == state


@pytest.mark.parametrize(("ended", "state"), [(2, "lost"), (1, "running")])
def test_the_state_is_that_of_the_newest_attempt(run_dir, ended, state):
    put_steps(run_dir, [1, 2], attempt=2)
    put_end(run_dir, ended, "lost")
    status = get_status(run_dir, now_s=1201.0)
    assert (status["state"], status["attempt"]) == (state, 2)


def test_a_run_that_wrote_nothing_yet_is_starting(tmp_path):
    status = get_status(RunDir(tmp_path / "none"), now_s=0.0)
    assert (status["state"], status["step"], status["usd"], status["eta_s"]) == ("starting", 0, None, None)


def test_a_rewind_is_seen_in_time_but_not_in_the_loss_over_tokens(run_dir):
    put_steps(run_dir, [1, 2, 3])
    put_steps(run_dir, [2, 3, 4], attempt=2, from_s=1010.0, world_size=1)
    curves = build_curves(read_story(run_dir))
    assert [point[3] for point in curves["loss"]] == [1, 2, 3, 4]
    assert [(world["attempt"], world["size"]) for world in curves["worlds"]] == [(1, 2), (2, 1)]
    assert [(world["startS"], world["endS"]) for world in curves["worlds"]] == [(0.0, 6.0), (10.0, 16.0)]
    assert curves["borders"] == [[100, 1, 2], [200, 2, 1]]


def test_long_curves_are_thinned_but_a_spike_of_one_step_stays(run_dir):
    story = read_story(run_dir)
    rows = [
        {"step": i, "tokens": i, "loss": 9.0 if i == 7777 else 2.0, "step_s": 1.0, "tokens_per_s": 1.0}
        | {"world_size": 1, "attempt": 1, "time_utc": format_utc(i)}
        for i in range(1, 10_001)
    ]
    curves = build_curves(replace(story, rows=rows, all_rows=rows))
    assert len(curves["loss"]) <= 1002
    assert max(curves["loss"], key=lambda point: point[1])[3] == 7777


def test_the_smoothed_loss_does_not_trail_behind_a_steep_curve(run_dir):
    put_steps(run_dir, range(1, 101))  # a straight line
    points = build_curves(read_story(run_dir))["loss"]
    assert all(abs(point[2] - point[1]) < 0.005 for point in points[20:80])  # half of what one step brings


def test_the_tiles_of_a_node_are_shown_as_booked(run_dir):
    put_ledger(run_dir)
    (node,) = build_curves(read_story(run_dir))["nodes"]
    assert node == {"name": "a", "gpus": 1, "bars": [[0, 20, STATES.index("start")], [20, 100, TRAIN]]}


def test_of_too_many_tiles_the_longest_state_stands_for_its_neighbours(run_dir):
    tiles = [  # 3000 s of saves that take a third of the time, then as long of saves that take two thirds
        LedgerRow(node="a", start_ms=at, end_ms=at + length_ms, state=state, gpus=1, usd=0.0)
        for i in range(6000)
        for offset_ms, length_ms, state in (
            ((0, 667, "train"), (667, 333, "save")) if i < 3000 else ((0, 333, "train"), (333, 667, "save"))
        )
        for at in [1000 * i + offset_ms]
    ]
    (node,) = build_curves(replace(read_story(run_dir), tiles=tiles))["nodes"]
    assert node["bars"] == [[0, 3000, TRAIN], [3000, 6000, SAVE]]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from(["train", "save"])), min_size=1, max_size=20))
def test_a_node_with_too_many_tiles_keeps_its_span_without_gaps(lengths):
    tiles, at = [], 0
    for length_ms, state in lengths * (6000 // len(lengths) + 1):
        tiles.append(LedgerRow(node="a", start_ms=at, end_ms=at + length_ms, state=state, gpus=1, usd=0.0))
        at += length_ms
    story = replace(read_story(RunDir(Path("/nonexistent"))), tiles=tiles)
    (node,) = build_curves(story)["nodes"]
    bars = node["bars"]
    assert (bars[0][0], bars[-1][1]) == (0, pytest.approx(at / 1000))
    assert all(bar[1] == later[0] and bar[2] != later[2] for bar, later in pairwise(bars))
    assert len(bars) <= 6000


def test_a_loss_that_ran_away_does_not_break_the_page(run_dir):
    put_steps(run_dir, [1, 2])
    row = {"step": 3, "tokens": 300, "loss": math.nan, "val_loss": math.inf, "step_s": 1.0, "tokens_per_s": 1.0}
    append_row(run_dir.metrics, row | {"world_size": 2, "attempt": 1, "time_utc": format_utc(1005)})
    page = build_report(run_dir, now_s=1006.0).read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [point[3] for point in data["loss"]] == [1, 2]


def test_strings_of_the_run_are_escaped_everywhere(run_dir):
    evil = "</script><b onclick=x>&"
    run_dir.config.write_text(json.dumps({"model": {"kind": evil}, "strategy": evil, "wandb": {"api_key": "hunter2"}}))
    ledger = Ledger()
    ledger.join(evil, 1000.0, gpus=1, usd_per_gpu_hour=1.0)
    for row in ledger.flush(1001.0):
        append_row(run_dir.ledger, row.to_row())
    append_row(run_dir.incidents, {"kind": evil, "node": evil, "noticed_s": 1000.5, "resumed_from": evil})
    put_end(run_dir, 1, evil)
    page = build_report(run_dir, now_s=1006.0).read_text()
    assert "<b onclick" not in page
    assert page.count("</script>") == 2
    assert "hunter2" not in page
