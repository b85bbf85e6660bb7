"""`solvent plan` and `--plan`, as users call them."""

import json
from pathlib import Path

import pytest

from cluster.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "8b-8xh100-spot.yaml")
KEYS = {"provider", "gpu", "gpus", "nodes", "kind", "fits", "memory_gib_per_gpu", "tokens_per_s", "hours", "usd"} | {
    "usd_per_mtoken",
    "goodput",
    "checkpoint_interval_s",
    "reason",
}


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_json_has_what_scripts_read(capsys):
    assert main(["plan", CONFIG, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"flops_total", "tokens", "offers", "chosen", "prices_as_of"} <= plan.keys()
    assert all(row.keys() >= KEYS for row in plan["offers"])
    assert plan["chosen"]["fits"]
    assert {row["strategy"] for row in plan["memory"]} == {"auto", "ddp", "fsdp2", "hsdp"}  # single: one GPU alone
    assert plan["prices_as_of"].startswith("2026-")


def test_the_plan_says_its_choice_and_the_age_of_its_prices(capsys):
    assert main(["plan", CONFIG, "--gpu", "H100", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "<- chosen" in out
    assert "prices as of 2026-10-10" in out
    assert "H200" not in out.partition("chosen:")[0]


def test_no_plan_is_exit_code_4_and_says_what_to_change(capsys):
    assert main(["plan", CONFIG, "--deadline-h", "1"]) == 4
    assert "--deadline-h" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-usd", "-5"], "argument --budget-usd: -5 must be more than 0"),
        (["--budget-usd", "0"], "must be more than 0"),
        (["--deadline-h", "nan"], "nan is no number that can be counted with"),
        (["--deadline-h", "soon"], "'soon' is no number"),
        (["--top", "0"], "must be at least 1"),
        (["--top", "1.5"], "is no whole number"),
        (["--gpu", "H1000"], "Did you mean H100-SXM?"),
        (["--provider", "nobody", "--kind", "bid"], "--kind bid --provider nobody leaves none of"),
    ],
)
def test_what_no_plan_can_keep_to_is_refused_with_the_reason(arguments, message, capsys):
    try:
        code = main(["plan", CONFIG, *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_catalog_without_a_price_is_told(tmp_path, capsys):
    catalog = tmp_path / "vms.csv"
    catalog.write_text("InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\nx,H100,8,0,,r\n")
    assert main(["plan", CONFIG, "--catalog", str(catalog)]) == 2
    assert "has no offer with a price" in capsys.readouterr().err


def test_every_configuration_that_ships_is_planned_or_refused_with_a_reason(capsys):
    codes = {path.stem: main(["plan", str(path), "--top", "1"]) for path in Path(CONFIG).parent.glob("*.yaml")}
    assert {name for name, code in codes.items() if code} == {"faults-demo", "faults-calibrate"}  # lists of faults
    assert "sft-lora-24gb.yaml has no model section" in capsys.readouterr().err


def test_an_old_gpu_is_told_what_it_can_compute(capsys):
    assert main(["plan", CONFIG, "--gpu", "T4"]) == 4
    said = capsys.readouterr().err
    assert "a T4 has no such arithmetic" in said
    assert ".." not in said


def test_the_budget_of_the_configuration_is_the_limit(capsys):
    assert main(["plan", CONFIG, "budget.max_usd=10"]) == 4
    assert "--budget-usd" in capsys.readouterr().err


def test_render_plans_first_if_asked_and_writes_nothing_without_a_plan(capsys):
    arguments = ["render", CONFIG, "--profile", "generic", "--set", "image=i", "--plan"]
    assert main([*arguments, "budget.max_hours=1"]) == 4
    assert capsys.readouterr().out == ""


def test_a_run_in_progress_is_planned_by_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(Path(CONFIG).read_text())
    row = {"step": 38290, "tokens": 80_299_950_080, "tokens_per_s": 1e5, "mfu": None, "world_size": 8}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["plan", "r", "--json"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert main(["plan", CONFIG, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert half["tokens_done"] == row["tokens"]
    assert half["chosen"]["usd"] == pytest.approx(whole["chosen"]["usd"] / 2, rel=0.001)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("budget.max_hours=2", "budget.max_hours=2 is over"),
        ("budget.max_usd=50", "budget.max_usd=50 is over: 60.00 USD are spent"),
        ("budget.max_usd=61", "--budget-usd 1"),  # what it leaves is the limit
    ],
)
def test_a_run_in_progress_has_what_its_budget_leaves(budget, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(Path(CONFIG).read_text())
    began = {"start_utc": "2026-01-01T00:00:00Z", "end_utc": "2026-01-01T01:00:00Z"}
    (run / "attempts.jsonl").write_text(json.dumps({"end": "interrupted", **began}) + "\n")
    (run / "ledger.jsonl").write_text(
        json.dumps({"node": "a", "state": "train", "gpus": 8, "usd": 60.0, **began}) + "\n"
    )
    assert main(["plan", "r", budget]) == 4
    assert message in capsys.readouterr().err
