"""Rows that a slow, full or vanished storage keeps waiting: none is lost, and the one who gives them never waits."""

import threading
import time
from types import SimpleNamespace

import pytest

from cluster.runtime.coordinator.records import row_writer as module
from cluster.runtime.coordinator.records.row_writer import RowWriter
from elastic.errors import StaleGenerationError, StorageError
from elastic.records.rundir import read_rows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_S", 0.01)


def open_writer(*, check_lead=lambda: None, patience_s=60.0):
    failures: list[BaseException] = []
    said: list[str] = []
    writer = RowWriter(check_lead=check_lead, on_failure=failures.append, say=said.append, patience_s=patience_s)
    return SimpleNamespace(writer=writer, failures=failures, said=said)


def test_rows_are_written_in_the_order_in_which_they_came(tmp_path):
    opened = open_writer()
    for number in range(20):
        opened.writer.append(tmp_path / "ledger.jsonl", {"number": number})
    assert opened.writer.wait(5)
    assert [row["number"] for row in read_rows(tmp_path / "ledger.jsonl")] == list(range(20))
    assert opened.writer.get_unwritten() == {}


def test_rows_wait_for_a_storage_that_is_away_and_are_complete_once_it_is_back(tmp_path):
    opened = open_writer()
    away = tmp_path / "away"
    opened.writer.append(away / "ledger.jsonl", {"number": 1})
    opened.writer.append(away / "attempts.jsonl", {"number": 2})
    assert not opened.writer.wait(0.1)
    assert opened.writer.get_unwritten() == {"ledger.jsonl": 1, "attempts.jsonl": 1}
    assert "No such file" in opened.writer.get_problem()
    away.mkdir()
    assert opened.writer.wait(5)
    assert [row["number"] for row in read_rows(away / "ledger.jsonl")] == [1]
    assert [row["number"] for row in read_rows(away / "attempts.jsonl")] == [2]
    assert len(opened.said) == 1, "it says once that rows wait"
    assert opened.failures == []


def test_who_gives_a_row_does_not_wait_for_the_storage(tmp_path):
    hangs = threading.Event()
    opened = open_writer(check_lead=hangs.wait)
    start_s = time.monotonic()
    for number in range(100):
        opened.writer.append(tmp_path / "ledger.jsonl", {"number": number})
    assert time.monotonic() - start_s < 1
    hangs.set()
    assert opened.writer.wait(5)


def test_a_storage_that_stays_away_is_told_once_and_tried_on(tmp_path):
    opened = open_writer(patience_s=0.05)
    away = tmp_path / "away"
    opened.writer.append(away / "ledger.jsonl", {"number": 1})
    assert not opened.writer.wait(0.3)
    assert [type(failure) for failure in opened.failures] == [StorageError]
    away.mkdir()
    assert opened.writer.wait(5)


def test_what_a_failed_write_has_left_of_its_line_is_no_part_of_the_next_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    tries = []

    def tear_first():
        tries.append(1)
        if len(tries) == 1:
            path.write_text('{"number": 1, "sta')
            raise StorageError("no space left")

    opened = open_writer(check_lead=tear_first)
    opened.writer.append(path, {"number": 1})
    assert opened.writer.wait(5)
    assert [row["number"] for row in read_rows(path)] == [1]


def test_rows_of_a_run_that_another_one_leads_are_not_written(tmp_path):
    def check():
        raise StaleGenerationError("another one leads")

    opened = open_writer(check_lead=check)
    opened.writer.append(tmp_path / "ledger.jsonl", {"number": 1})
    assert opened.writer.wait(5)
    assert not (tmp_path / "ledger.jsonl").exists()
    assert [type(failure) for failure in opened.failures] == [StaleGenerationError]
