"""At its end a run says what its plan would have been, and later plans go by what was seen."""

import json

import pytest

from cluster.cli._bill import compare_with_plan
from cluster.planner.calibration import get_file, load_scales
from cluster.planner.candidates import Evaluator
from cluster.runtime.view import View
from elastic.records.rundir import RunDir, format_utc
from elastic.sinks.wandb import KEYS
from tests.unit._planned import plan_config
from tests.unit.test_planner_choice import offer


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_run(folder, config, *, tokens_per_s, mfu, hours=1.0):
    run_dir = RunDir(folder)
    folder.mkdir(exist_ok=True)
    tokens = config.train.global_batch * config.data.seq_len
    rows = [
        {"step": n, "tokens": n * tokens, "tokens_per_s": tokens_per_s, "mfu": mfu, "world_size": 1}
        for n in range(1, config.train.steps + 1)
    ]
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt = {"start_utc": format_utc(0.0), "end_utc": format_utc(3600 * hours), "nodes": ["a"], "end": "finished"}
    run_dir.attempts.write_text(json.dumps(attempt) + "\n")
    tile = {"node": "a", "state": "train", "gpus": 1, "usd": 2.0 * hours}
    tile |= {"start_utc": format_utc(0.0), "end_utc": format_utc(3600 * hours)}
    run_dir.ledger.write_text(json.dumps(tile) + "\n")
    return run_dir


def test_predicted_stands_beside_realised_and_the_next_plan_knows_better(tmp_path):
    config = plan_config("1.5B", steps=50)
    plan = Evaluator(config).evaluate(offer(gpu="H200", gpus=1), 1)
    speed = 0.8 * plan.tokens_per_s
    mfu = speed * config.model.flops_per_token(4096) / 989.4e12
    (line,) = compare_with_plan(config, write_run(tmp_path / "r", config, tokens_per_s=speed, mfu=mfu))
    assert f"{plan.tokens_per_s:,.0f} and {speed:,.0f} tokens/s" in line
    assert "and 2.00 USD" in line
    assert load_scales(get_file())["H200"] == pytest.approx(1.25, rel=1e-3)
    again = list(compare_with_plan(config, write_run(tmp_path / "r", config, tokens_per_s=speed, mfu=mfu)))
    assert f"{speed:,.0f} and {speed:,.0f} tokens/s" in again[0]


def test_a_run_on_cpus_has_no_plan(tmp_path):
    config = plan_config("1.5B", steps=50)
    assert list(compare_with_plan(config, write_run(tmp_path / "r", config, tokens_per_s=10.0, mfu=None))) == []
    assert load_scales(get_file()) == {}


class Kept:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)

    def close(self):
        pass


def test_a_sink_is_told_what_was_wasted_and_on_what():
    from cluster.ledger import Ledger
    from cluster.runtime.coordinator.published import Update

    ledger = Ledger()
    ledger.join("a", 0.0, gpus=1, usd_per_gpu_hour=3600.0)
    ledger.switch("a", "train", 10.0)
    ledger.switch("a", "redo", 30.0)
    ledger.flush(35.0)
    totals = ledger.totals()
    summary = {
        "usd": totals.usd,
        "usd_per_mtoken": 1.0,
        "usd_wasted": totals.usd_by_cause,
        "goodput": totals.goodput,
        "available_goodput": totals.available_goodput,
        "incidents": [],
    }
    kept = Kept()
    with View(plan_config(), lambda: [kept]) as view:
        update = Update(
            rows=[{"step": 1, "tokens": 1}],
            lines=[],
            stage="running",
            attempt=1,
            workers=[],
            summary=summary,
            done=None,
        )
        view.update(update)
    (row,) = kept.rows
    named = {KEYS[name]: value for name, value in row.items() if name in KEYS}
    assert named["cost/wasted_usd"] == pytest.approx(15)
    assert named["cost/wasted/redo"] == pytest.approx(5)
    assert named["cost/wasted/starting"] == pytest.approx(10)
    assert named["cost/available_goodput"] == pytest.approx(20 / 25)
