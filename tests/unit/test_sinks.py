import io
import json
import subprocess
import sys

import pytest

from elastic import plugins
from elastic.config import RunConfig, TrainConfig
from elastic.errors import StorageError
from elastic.records.rundir import RunDir, append_row, read_rows
from elastic.redact import redact
from elastic.sinks import jsonl, wandb
from elastic.sinks.console import ConsoleSink


@pytest.mark.parametrize("kind", plugins.get_names("elastic.sinks"))
def test_a_sink_can_be_built_without_torch(kind):
    code = f"import sys, elastic.sinks.{kind} as sink; assert callable(sink.build); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_after_a_torn_line_is_not_lost_with_it(tmp_path):
    run_dir = RunDir(tmp_path)
    append_row(run_dir.metrics, {"step": 1})
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    sink = jsonl.build(RunConfig(), run_dir)
    sink.write({"step": 2})
    sink.close()
    assert [row["step"] for row in read_rows(run_dir.metrics)] == [1, 2]


def test_a_run_directory_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="set storage to another place"):
        jsonl.build(RunConfig(), RunDir(tmp_path / "file" / "run"))


def test_the_console_prints_what_a_row_has():
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=20, stream=stream)
    sink.write({"step": 7, "loss": 2.5, "tokens_per_s": 12345.6, "mfu": None})
    assert stream.getvalue() == "step 7/20  loss 2.5000  tokens/s 12,346\n"


def test_a_closed_console_does_not_stop_training():
    stream = io.StringIO()
    stream.close()
    ConsoleSink(total_steps=1, stream=stream).write({"step": 1})


def test_secrets_are_redacted_and_counts_of_tokens_are_not():
    secret = {"api_key": "x", "hf_token": "x", "password": "", "a": [{"client-secret": 1}], "key": None}
    kept = {"warmup_tokens": 5, "storage": "s3://bucket/path", "monkey": "m"}
    assert redact({**secret, **kept, "url": "https://me:pw@host/x"}) == {
        "api_key": "[redacted]",
        "hf_token": "[redacted]",
        "password": "",
        "a": [{"client-secret": "[redacted]"}],
        "key": None,
        "url": "https://[redacted]@host/x",
        **kept,
    }


def test_the_wandb_id_follows_storage_and_name_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = RunConfig(storage="runs", run="a")
    same = RunConfig(storage=str(tmp_path / "runs"), run="a", train=TrainConfig(steps=7))
    assert wandb.get_run_id(here) == wandb.get_run_id(same)
    assert wandb.get_run_id(here) != wandb.get_run_id(RunConfig(storage="runs", run="b"))


def test_a_wandb_fault_stops_the_sink_and_not_the_training(caplog):
    class Broken:
        def log(self, values):
            raise RuntimeError(json.dumps(values))

    sink = wandb.WandbSink(Broken())
    sink.write({"loss": 1.0, "unknown": 2})
    sink.write({"loss": 2.0})
    sink.close()
    assert [record.getMessage() for record in caplog.records] == [
        'W&B stopped taking rows ({"train/loss": 1.0}); metrics.jsonl goes on having all of them.'
    ]
