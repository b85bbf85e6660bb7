"""What needs a second try is told, and more than a few of those fail the whole; in pytest sessions of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import second_try

ROOT = Path(__file__).parents[2]
FLAKY = """
import random
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(3))
def test_flaky(number, request):
    print("drew", random.random())
    mark = Path(__file__).with_name(f"mark-{number}")
    tried = mark.exists()
    mark.touch()
    assert tried

def test_broken():
    assert False
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(second_try, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(second_try, "TOLERATED", 2)
    (tmp_path / "test_flaky.py").write_text(FLAKY)
    hooks = (
        "from tests import second_try\nfrom pathlib import Path\nsecond_try.FOLDER = Path(__file__).parent / 'kept'\n"
    )
    names = "pytest_configure, pytest_report_header, pytest_runtest_setup"
    (tmp_path / "conftest.py").write_text(f"{hooks}from tests.second_try import {names}\n")
    return tmp_path


def run(folder, *arguments, **env):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_what_passes_on_a_second_try_is_reported_and_what_fails_twice_is_not(folder, capsys):
    run(folder, "-k", "number0 or broken or test_flaky", SOLVENT_TEST_SEED="77")
    out = run(folder, SOLVENT_SECOND_TRY="1", SOLVENT_TEST_SEED="78")
    assert "3 passed" in out and "1 failed" in out
    assert second_try.main("end") == 1  # three, where two are tolerated
    told = capsys.readouterr().out
    assert [f"test_flaky[{n}] passed on its second try; the first, seed 77, in call:" in told for n in range(3)] == [
        True
    ] * 3
    assert "test_broken passed" not in told
    assert "3 test(s) needed a second try" in told


def test_a_second_try_after_none_that_ran_ends_without_a_word(folder):
    out = run(folder, "-k", "nothing_of_this_name", SOLVENT_SECOND_TRY="1")
    assert "INTERNALERROR" not in out and "4 deselected" in out
    assert second_try.main("end") == 0


def test_two_are_tolerated_and_the_next_call_begins_anew(folder, capsys):
    run(folder, "test_flaky.py::test_flaky[0]", "test_flaky.py::test_flaky[1]")
    run(folder, SOLVENT_SECOND_TRY="1")
    assert second_try.main("end") == 0
    assert "2 test(s) needed a second try" in capsys.readouterr().out
    assert second_try.main("begin") == 0
    assert second_try.main("end") == 0
    assert capsys.readouterr().out == ""


def test_a_seed_repeats_what_a_test_drew(folder):
    draws = []
    for seed in ("1", "1", "2"):
        for mark in folder.glob("mark-*"):
            mark.unlink()
        out = run(folder, "test_flaky.py::test_flaky[0]", SOLVENT_TEST_SEED=seed)
        draws.append(next(line for line in out.splitlines() if line.startswith("drew")))
        assert f"SOLVENT_TEST_SEED={seed}" in out
    assert draws[0] == draws[1] != draws[2]
