"""A run whose storage is S3, throttled and failing at times, killed and resumed, ends as one on a disk that was not."""

import json
import os
import signal
import threading
import time

import pytest

from cluster.cli import main
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.distributed._launch import Ranks, wait_until
from tests.flaky_proxy import FATES, open_proxy

pytestmark = pytest.mark.timeout(600)

CONFIG = """
strategy: fsdp2
device: cpu
model: {dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 64, vocab_size: 300}
data: {seq_len: 32, record_samples: true}
train: {steps: 24, global_batch: 7, micro_batch: 2, eval_samples: 8}
optim: {lr: 3.0e-3}
checkpoint: {every_steps: 4}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bible):
    folder = tmp_path_factory.mktemp("objects")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data").symlink_to(bible)
    return folder


def launch(folder, storage, *, num_ranks):
    where = (f"data.path={folder / 'data'}", f"storage={storage}", "run=a")
    return Ranks(num_ranks, str(folder / "config.yaml"), *where)


def finish(folder, storage):
    with launch(folder, storage, num_ranks=2) as ranks:
        codes, output = ranks.wait()
    assert codes == [0, 0], output
    return output


def get_losses(run_dir):
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in final_rows(read_rows(run_dir.metrics))}


def fetch(storage, into):
    """Copy the rows of a run out of the store."""
    into.mkdir()
    for key in storage.list():
        if "/" not in key:
            (into / key).write_bytes(storage.read(key))
    return RunDir(into)


def get_committed_steps(storage):
    return sorted(int(key.split("/")[1][5:]) for key in storage.list("checkpoints/") if key.endswith("COMMITTED"))


def test_a_run_on_s3_survives_failing_requests_and_kills_bit_for_bit(folder, tmp_path, s3_url, monkeypatch, capsys):
    finish(folder, tmp_path / "runs")
    storage = open_storage(f"{s3_url}/a")  # straight to the server
    server = os.environ["AWS_ENDPOINT_URL"]
    killed = threading.Event()

    def is_held(path):  # training takes less time than a commit: the second one waits, or the run ends before its kill
        return "step-" in path and "step-00000004" not in path and not killed.is_set()

    with open_proxy(server, rate=0.04, seed=1, held=is_held) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with launch(folder, s3_url, num_ranks=2) as ranks:
            wait_until(lambda: get_committed_steps(storage) == [4], [])
            ranks.send(signal.SIGKILL, 0, 1)
            ranks.wait()
        killed.set()
        committed = get_committed_steps(storage)[-1]
        rows = get_losses(fetch(storage, tmp_path / "killed"))
        assert list(rows)[:committed] == list(range(1, committed + 1)), "rows up to a commit are never lost"
        start_s = time.monotonic()
        finish(folder, s3_url)
        resume_s = time.monotonic() - start_s
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    run_dir = fetch(storage, tmp_path / "finished")
    assert get_losses(run_dir) == get_losses(RunDir(tmp_path / "runs" / "a"))
    first, second = read_rows(run_dir.attempts)
    assert (first["attempt"], first["end"], second["attempt"], second["end"]) == (1, "lost", 2, "finished")
    assert second["first_step"] == committed + 1
    assert min(done[fate] for fate in FATES) > 0, done
    assert main(["checkpoint", "verify", f"{s3_url}/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in told["checkpoints"]][-1] == 24
    with capsys.disabled():
        print(f"\nrequests: {dict(done)}; killed after the commit of step {committed}; rest in {resume_s:.1f} s")


def test_a_bucket_that_is_not_there_is_explained(folder, s3_environment):
    with launch(folder, "s3://no-such-bucket/runs", num_ranks=1) as ranks:
        ((code,), output) = ranks.wait()
    assert code == 2
    assert "no-such-bucket" in output
    assert "Traceback" not in output
