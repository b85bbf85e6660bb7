"""Every file that a run leaves behind, and every --json, can be read by a strict parser."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli._runs import print_json
from cluster.report.status import get_status
from elastic.records.rundir import RunDir, append_row, format_utc, read_rows
from elastic.sinks.console import format_row
from elastic.strict_json import dump_json, load_json

NOT_FINITE = [math.nan, math.inf, -math.inf]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
)


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def load_strictly(text):
    return json.loads(text, parse_constant=refuse)


@given(VALUES)
def test_whatever_is_written_a_strict_parser_reads_it(value):
    assert load_strictly(dump_json(value)) == load_json(dump_json(value))


@given(VALUES.map(lambda value: json.loads(json.dumps(value), parse_constant=lambda _: 0.0)))
def test_what_is_finite_comes_back_as_it_was(value):
    assert load_strictly(dump_json(value)) == value


@pytest.mark.parametrize("loss", NOT_FINITE)
def test_a_row_of_a_step_whose_loss_ran_away_is_strict_json(tmp_path, loss):
    append_row(tmp_path / "metrics.jsonl", {"step": 3, "loss": loss, "bad_step": "not_finite", "more": [loss]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert load_strictly(line) == {"step": 3, "loss": None, "bad_step": "not_finite", "more": [None]}


@pytest.mark.parametrize("loss", NOT_FINITE)
def test_json_on_stdout_is_strict(capsys, loss):
    print_json({"final_loss": loss})
    assert load_strictly(capsys.readouterr().out) == {"final_loss": None}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "null"])
def test_rows_of_earlier_versions_read_as_those_of_today(tmp_path, word):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": WORD, "grad_norm": 2.0}\n'.replace("WORD", word))
    assert list(read_rows(path)) == [{"step": 1, "loss": None, "grad_norm": 2.0}]


def test_status_and_console_show_a_step_without_a_loss(tmp_path):
    run_dir = RunDir(tmp_path)
    row = {"step": 1, "tokens": 100, "step_s": 1.0, "tokens_per_s": 100.0, "mfu": None, "world_size": 1, "attempt": 1}
    row |= {"time_utc": format_utc(1000.0), "grad_norm": math.nan}
    append_row(run_dir.metrics, row | {"loss": 2.5, "val_loss": 2.25})
    append_row(run_dir.metrics, row | {"step": 2, "loss": math.inf, "bad_step": "not_finite", "val_loss": math.nan})
    status = get_status(run_dir, now_s=1000.0)
    assert (status["loss"], status["val_loss"], status["bad_steps"]) == (None, None, 1)
    (_, bad) = read_rows(run_dir.metrics)
    assert "NOT APPLIED: not finite" in format_row(bad, total_steps=2)


def test_status_and_console_say_what_a_loss_would_redo_now(tmp_path):
    run_dir = RunDir(tmp_path)
    row = {"step": 7, "tokens": 100, "loss": 2.5, "step_s": 1.0, "tokens_per_s": 100.0, "world_size": 2, "attempt": 1}
    row |= {"time_utc": format_utc(1000.0), "redo_steps_trainer_lost": 2, "redo_steps_node_lost": 5}
    append_row(run_dir.metrics, row)
    status = get_status(run_dir, now_s=1000.0)
    assert (status["redo_steps_trainer_lost"], status["redo_steps_node_lost"]) == (2, 5)
    assert "a lost node redoes 5" in format_row(row, total_steps=9)
    assert "redoes" not in format_row(row | {"redo_steps_node_lost": None}, total_steps=9)
