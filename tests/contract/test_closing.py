"""A storage that is away when a run ends: its last rows are waited for, and what is missing in the end is named."""

import json
import shutil
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from cluster.runtime.coordinator.records.closing import ClosingUp
from cluster.runtime.coordinator.records.row_writer import RowWriter
from cluster.runtime.coordinator.records.run_records import open_run_records
from elastic.config import RunConfig
from elastic.records.rundir import RunDir, append_row, read_rows
from elastic.records.spool import fetch_rows, open_run
from elastic.storage import open_storage
from elastic.storage.faulty import FAULTS_VARIABLE


def open_closing(storage):
    """A run with one node that is paid since 100 s ago, and what closes its records."""
    opened = ExitStack()
    run = opened.enter_context(open_run(str(storage), "a"))
    run.dir.root.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    failures: list[BaseException] = []
    writer = RowWriter(check_lead=lambda: None, on_failure=failures.append, say=said.append)
    records = open_run_records(str(run.dir.root), RunConfig(), append=writer.append)
    records.join("n", time.time() - 100, gpus=1, usd_per_gpu_hour=0.0)
    closing = ClosingUp(run, records=records, writer=writer, say=said.append)
    return SimpleNamespace(run=run, opened=opened, closing=closing, writer=writer, said=said)


def close(it, patience_s):
    it.closing.bring_rows(patience_s)
    it.closing.end(it.opened)
    return it.closing.get_state()


def test_a_directory_that_is_back_in_time_has_all_rows(tmp_path):
    it = open_closing(tmp_path)
    root = it.run.dir.root
    shutil.move(root, tmp_path / "elsewhere")
    threading.Timer(1.0, lambda: shutil.move(tmp_path / "elsewhere", root)).start()
    closed = close(it, 30)
    assert (closed.is_over, closed.missing) == (True, "")
    assert [row["state"] for row in read_rows(RunDir(root).ledger)] == ["start"]


def test_a_directory_that_stays_away_is_named_with_how_many_rows_it_lacks(tmp_path):
    it = open_closing(tmp_path)
    shutil.move(it.run.dir.root, tmp_path / "elsewhere")
    start_s = time.monotonic()
    closed = close(it, 1)
    assert time.monotonic() - start_s < 10
    assert closed.is_over
    assert f"1 row(s) of ledger.jsonl did not reach {tmp_path}/a: storage: " in closed.missing
    assert "No such file" in closed.missing
    assert closed.missing.endswith("They are in no file")
    (tmp_path / "a").mkdir()  # let the writer go


@pytest.fixture
def fault(tmp_path, monkeypatch):
    """A store that refuses to take anything while a file is there."""
    control = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_VARIABLE, str(control))

    def begin():
        control.write_text(json.dumps({"full": {"rate": 1.0, "until_s": time.time() + 600, "seed": 0}}))
        return control

    return begin


def read_stored(url, tmp_path):
    folder = RunDir(tmp_path / "fetched")
    folder.root.mkdir()
    fetch_rows(open_storage(url), folder)
    return folder


def test_a_store_that_is_back_in_time_has_the_rows_of_the_spool(s3_url, tmp_path, fault):
    it = open_closing(s3_url)
    append_row(it.run.dir.metrics, {"step": 1, "tokens": 1})
    control = fault()
    threading.Timer(1.5, control.unlink).start()
    closed = close(it, 60)
    assert (closed.is_over, closed.missing) == (True, "")
    stored = read_stored(f"{s3_url}/a", tmp_path)
    assert [row["step"] for row in read_rows(stored.metrics)] == [1]
    assert [row["state"] for row in read_rows(stored.ledger)] == ["start"]
    assert not it.run.dir.root.exists(), "the spool is left behind"


def test_a_store_that_stays_away_is_named_and_the_spool_is_kept_with_what_it_lacks(s3_url, fault):
    it = open_closing(s3_url)
    for step in (1, 2):
        append_row(it.run.dir.metrics, {"step": step, "tokens": step})
    control = fault()
    closed = close(it, 0)
    assert closed.is_over
    assert "1 row(s) of ledger.jsonl, 2 row(s) of metrics.jsonl did not reach s3://" in closed.missing
    assert f"They wait in {it.run.dir.root}" in closed.missing
    assert [row["step"] for row in read_rows(it.run.dir.metrics)] == [1, 2]
    control.unlink()
    it.opened.close()
