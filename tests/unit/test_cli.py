"""The command line: what it prints, what it returns, and how fast it answers."""

import json
import re
import resource
import subprocess
import sys

import pytest

from cluster.cli import _parse as parse
from cluster.cli import main
from elastic.records.rundir import RunDir, append_row

SOLVENT = [sys.executable, "-c", "from cluster.cli import enter; enter()"]


def test_help_takes_less_than_300_ms():
    def cpu_s():  # of the child: what it would take on a machine that does nothing else
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*SOLVENT, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < 0.3


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cluster.cli import build_parser; build_parser().format_help();"
        "print({'torch', 'ray', 'omegaconf', 'wandb', 'pyarrow', 'rich', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_an_unknown_verb_returns_2_and_names_the_verbs(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["statsu", "demo"])
    assert "status" in capsys.readouterr().err


def test_a_user_error_is_one_line_on_stderr_and_returns_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert main(["status", "dmeo"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("solvent: RUN=dmeo") and "Did you mean demo?" in err


def test_debug_shows_where_an_error_came_from(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--debug", "status", "none"]) == 2
    assert "Traceback" in capsys.readouterr().err


def make_run(tmp_path):
    run = RunDir(tmp_path / "runs" / "mine")
    run.root.mkdir(parents=True)
    row = {"loss": 5.5, "lr": 1e-3, "grad_norm": 1.0, "step_s": 1.0, "tokens_per_s": 8.0, "mfu": 0.1, "world_size": 3}
    for step in (1, 2):
        time_utc = f"2026-11-24T00:00:0{step}.000Z"
        append_row(run.metrics, {**row, "step": step, "tokens": step * 8, "attempt": 1, "time_utc": time_utc})
    return run


def test_status_tells_in_json_how_far_a_run_has_come(capsys, tmp_path, monkeypatch):
    make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["status", "mine", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["run"], status["step"], status["tokens"]) == ("mine", 2, 16)


def test_status_prints_a_line_per_value(capsys, tmp_path):
    assert main(["status", str(make_run(tmp_path).root)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step +2$", out, re.MULTILINE)
    assert re.search(r"^val_loss +-$", out, re.MULTILINE)


def test_report_prints_where_the_page_is(capsys, tmp_path):
    run = make_run(tmp_path)
    assert main(["report", str(run.root)]) == 0
    assert capsys.readouterr().out == f"{run.report}\n"
    assert run.report.read_text().lstrip().lower().startswith("<!doctype html>")


def test_a_mistyped_folder_is_refused_with_the_nearest_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path)
    assert main(["status", "elsewhere/mine"]) == 2
    assert "Did you mean mine?" in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_options():
    args = parse(["train", "demo.yaml", "run=a", "--json", "train.steps=3"])
    assert (args.overrides, args.json) == (["run=a", "train.steps=3"], True)


@pytest.mark.parametrize(
    "argv", [["train", "c.yaml", "--jsn", "a=b"], ["status", "run", "a=b"], ["train", "c.yaml", "--x=1"]]
)
def test_what_no_verb_takes_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_provider_that_nobody_wrote_is_refused_before_anything_starts(capsys, tmp_path):
    assert main(["train", "configs/demo.yaml", f"storage={tmp_path}", "cluster.notices=asw"]) == 2
    assert "cluster.notices='asw' is not known. Use auto, off or one of: aws, azure" in capsys.readouterr().err
