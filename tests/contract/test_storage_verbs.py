"""The verbs and an object store: what cannot work is found before a node is claimed, and explained in one line."""

import json

import pytest

from cluster.cli import main
from elastic.records.rundir import RunDir, append_row
from elastic.storage import objects, open_storage

CONFIG = """
run: a
device: cpu
model: {dim: 16, num_layers: 1, num_heads: 1, num_kv_heads: 1, ffn_dim: 16, vocab_size: 300}
data: {seq_len: 16}
train: {steps: 2, global_batch: 4, micro_batch: 4, eval_samples: 4}
wandb: {mode: disabled}
"""
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "config.yaml").write_text(CONFIG)
    text = (json.dumps({"text": f"{n} sheep went over {n * n} hills to see what they could see."}) for n in range(500))
    (folder / "text.jsonl").write_text("\n".join(text) + "\n")
    assert main(["prepare", str(folder / "text.jsonl"), "--out", str(folder / "data"), "--vocab-size", "300"]) == 0
    return folder


def have_no_bucket(monkeypatch):
    return "s3://no-such-bucket/runs", ("s3://no-such-bucket/runs/a/", "NoSuchBucket", "Create the bucket")


def have_no_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", NOBODY)  # where a machine of AWS would have got some
    return "s3://bucket/runs", ("s3://bucket/runs/a/", f"PUT {NOBODY}/latest/api/token", "the credentials")


def have_no_account(monkeypatch):
    return "az://bucket/runs", ("storage='az://bucket/runs/a' cannot be opened", "Account must be specified", "AZURE_*")


def have_no_server(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY)
    return "s3://bucket/runs", ("s3://bucket/runs/a/", NOBODY, "AWS_ENDPOINT_URL and the network")


def have_no_such_store(monkeypatch):
    return "ftp://bucket/runs", ("storage='ftp://bucket/runs/a' is no place that can be opened", "s3://bucket/folder")


@pytest.mark.parametrize(
    "mistake", [have_no_bucket, have_no_credentials, have_no_account, have_no_server, have_no_such_store]
)
def test_train_finds_a_store_that_does_not_work_before_it_starts_anything(
    mistake, place, s3_environment, monkeypatch, capsys
):
    storage, parts = mistake(monkeypatch)
    monkeypatch.setitem(objects._PATIENT, "max_retries", 3)  # of ten, within a minute
    arguments = [str(place / "config.yaml"), f"data.path={place / 'data'}", f"storage={storage}"]
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("verb", ["status", "report"])
def test_who_looks_for_a_run_that_is_not_there_is_told(verb, s3_url, monkeypatch, capsys):
    for url, part in (
        (f"{s3_url}/none", "no run has trained there. Give the URL of its storage with its name"),
        ("s3://no-such-bucket/runs/a", "cannot be read"),
    ):
        assert main([verb, url]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert url in line and part in line


def test_status_and_report_read_a_store(s3_url, tmp_path, capsys):
    rows = RunDir(tmp_path)
    row = {"loss": 5.5, "lr": 1e-3, "grad_norm": 1.0, "step_s": 1.0, "tokens_per_s": 8.0, "mfu": 0.1, "world_size": 3}
    append_row(rows.metrics, {**row, "step": 1, "tokens": 8, "attempt": 1, "time_utc": "2026-11-24T00:00:01.000Z"})
    storage = open_storage(f"{s3_url}/mine")
    storage.write("metrics.jsonl", [rows.metrics.read_bytes()])
    assert main(["status", f"{s3_url}/mine/", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["run"], status["step"], status["tokens"]) == ("mine", 1, 8)
    assert main(["report", f"{s3_url}/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": f"{s3_url}/mine/report.html"}
    assert b"mine" in storage.read("report.html")


def test_verbs_that_work_on_files_say_why_they_take_no_url(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    faults = tmp_path / "faults.yaml"
    faults.write_text("- {at_step: 1, fault: kill, target: 0}\n")
    chaos = ["chaos", str(place / "config.yaml"), "--faults", str(faults), "storage=s3://b/runs"]
    for command, part in (
        (chaos, "storage=s3://b/runs: chaos watches saves and counts samples"),
        (["demo", "--out", "s3://b/demo"], "--out=s3://b/demo: the demo trains on this machine"),
        (["demo", "storage=s3://b/runs"], "storage=s3://b/runs: the demo trains on this machine"),
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line and "to a path" in line
    assert not (tmp_path / "s3:").exists()
