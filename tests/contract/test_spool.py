"""The rows of a run in an object store: what a process that was killed has left of them, and who may go on from it."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.records.rundir import RunDir, read_rows
from elastic.records.spool import fetch_rows
from elastic.storage import open_storage

ROOT = Path(__file__).parents[2]


@contextmanager
def start(machine, storage, *words):
    """Start a keeper of rows in the temporary folder of a machine; end it with -9 if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.contract._leader", storage, *words],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(machine)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def call(machine, storage, *words):
    """Let a keeper end in order; return the steps of its rows."""
    with start(machine, storage, *words, "show") as process:
        return process.communicate()[0].strip()


def kill(machine, storage, *words):
    """Kill a keeper once it has done as it was told."""
    with start(machine, storage, *words, "wait") as process:
        assert process.stdout.readline() == "waits\n"


def read_steps(storage, run, tmp_path):
    """Return the steps of the rows that the store has."""
    folder = tmp_path / "fetched"
    folder.mkdir(exist_ok=True)
    fetch_rows(open_storage(f"{storage}/{run}"), RunDir(folder))
    return [row["step"] for row in read_rows(RunDir(folder).metrics)]


def find_spools(machine):
    return [path.name for path in machine.iterdir()]


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_the_rows_of_a_killed_leader_are_taken_over_by_the_next_one_on_its_machine(here, s3_url, tmp_path):
    kill(here, s3_url, "a", "lead", "row:1", "sample:1", "push", "row:2", "row:3", "sample:2")
    assert read_steps(s3_url, "a", tmp_path) == [1]
    assert len(find_spools(here)) == 1
    assert call(here, s3_url, "a", "lead", "row:4") == "1 2 3 4"
    assert read_steps(s3_url, "a", tmp_path) == [1, 2, 3, 4]
    samples = open_storage(f"{s3_url}/a").read("samples-1-0.jsonl").decode()
    assert samples.count("\n") == 2, "files that are not fetched are taken over as well"
    assert find_spools(here) == []


def test_of_two_killed_leaders_the_last_one_counts(here, s3_url, tmp_path):
    kill(here, s3_url, "a", "lead", "row:1", "push", "row:2")
    kill(here, s3_url, "a", "lead", "row:3")
    assert call(here, s3_url, "a", "lead") == "1 2 3"
    assert read_steps(s3_url, "a", tmp_path) == [1, 2, 3]


def test_of_two_spools_that_do_not_know_each_other_the_last_leaders_counts(here, elsewhere, s3_url):
    kill(here, s3_url, "a", "lead", "row:1", "push", "row:2")
    kill(elsewhere, s3_url, "a", "lead", "row:3")
    (spool,) = elsewhere.iterdir()
    spool.rename(here / spool.name)
    assert call(here, s3_url, "a", "lead") == "1 3"
    assert find_spools(here) == []


def test_a_leader_elsewhere_is_never_overwritten_with_what_an_older_one_has_left(here, elsewhere, s3_url, tmp_path):
    kill(here, s3_url, "a", "lead", "row:1", "push", "row:2", "row:3")
    assert call(elsewhere, s3_url, "a", "lead", "row:2") == "1 2"
    assert call(here, s3_url, "a", "lead") == "1 2"
    assert read_steps(s3_url, "a", tmp_path) == [1, 2]
    assert find_spools(here) == []


def test_a_run_that_began_anew_under_its_name_takes_nothing_from_the_deleted_one(here, s3_url):
    kill(here, s3_url, "a", "lead", "row:1", "push", "row:2")
    storage = open_storage(f"{s3_url}/a")
    storage.delete(storage.list())
    assert call(here, s3_url, "a", "lead", "row:7") == "7"


def test_spools_of_other_runs_and_of_living_processes_are_left_alone(here, s3_url):
    kill(here, s3_url, "other", "lead", "row:1", "push", "row:2")
    with start(here, s3_url, "a", "wait") as other:  # one that only looks on, as the other ranks of torchrun do
        assert other.stdout.readline() == "waits\n"
        assert call(here, s3_url, "a", "lead", "row:9") == "9"
        assert len(find_spools(here)) == 2
    assert call(here, s3_url, "other", "lead") == "1 2"


def test_who_was_waiting_for_the_lead_has_the_rows_that_were_pushed_meanwhile(here, elsewhere, s3_url):
    assert call(here, s3_url, "a", "lead", "row:1") == "1"
    with start(here, s3_url, "a", "wait", "lead", "show") as late:
        assert late.stdout.readline() == "waits\n"
        assert call(elsewhere, s3_url, "a", "lead", "row:2") == "1 2"
        assert late.communicate("\n")[0] == "1 2\n"
