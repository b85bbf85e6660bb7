"""`solvent checkpoint import` and `export`, on a disk and in an object store: what they leave, and what they refuse."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from elastic.checkpoint.format.manifest import COMMITTED, MANIFEST, get_directory
from elastic.data.preparation.prepare import prepare
from elastic.records.rundir import read_rows
from elastic.storage import open_storage
from tests.contract._hf import MODEL, write_hf_folder
from tests.forked import Elastic

TOKENIZER = {
    "tokenizer.json": b'{"not": "read"}',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "chat_template.jinja": b"{{ messages }}",
}


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Return where models and runs are: a path or a URL."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3_url")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {seq_len: 8}\n")
    return str(path)


def call(capsys, *arguments):
    """Return the exit code, and the JSON or else the message."""
    capsys.readouterr()
    code = main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if code == 0 else captured.err


def import_tuned(capsys, place, config, *more):
    return call(capsys, "import", f"{place}/theirs", config, f"storage={place}/runs", "run=tuned", *more, "--json")


def test_a_model_goes_in_and_comes_out_as_it_was_with_all_that_stood_beside_it(place, config, capsys):
    theirs = open_storage(write_hf_folder(f"{place}/theirs", files=TOKENIZER))
    code, imported = import_tuned(capsys, place, config)
    assert code == 0, imported
    assert imported["run"] == f"{place}/runs/tuned"
    code, exported = call(
        capsys, "export", imported["run"], "--out", f"{place}/again", "--max-shard-gib", 2200 / 2**30, "--json"
    )
    assert code == 0, exported
    again = open_storage(f"{place}/again")
    assert again.list() == theirs.list() and set(TOKENIZER) <= set(again.list())
    for key in theirs.list():
        if key != "config.json":
            assert again.read(key) == theirs.read(key), key
    configs = [json.loads(storage.read("config.json")) for storage in (theirs, again)]
    assert configs[0] == configs[1]


def test_a_run_begins_once(place, config, capsys):
    write_hf_folder(f"{place}/theirs")
    assert import_tuned(capsys, place, config)[0] == 0
    run = open_storage(f"{place}/runs/tuned")
    before = {key: run.read(key) for key in run.list()}
    code, message = import_tuned(capsys, place, config)
    assert code == 2 and "has a checkpoint of step 0 already" in message and "run=<new name>" in message
    assert {key: run.read(key) for key in run.list()} == before


def test_an_import_that_was_cut_short_is_invisible_and_can_be_done_again(place, config, capsys):
    write_hf_folder(f"{place}/theirs")
    assert import_tuned(capsys, place, config)[0] == 0
    run = open_storage(f"{place}/runs/tuned")
    run.delete([f"{get_directory(0)}/{name}" for name in (COMMITTED, MANIFEST)])
    code, message = call(capsys, "export", run.url, "--out", f"{place}/again", "--tokenizer", "none")
    assert code == 2 and "has no finished checkpoint" in message
    code, imported = import_tuned(capsys, place, config)
    assert code == 0, imported
    assert run.get_size(f"{get_directory(0)}/{COMMITTED}") is not None


@pytest.fixture
def project(tmp_path, capsys, monkeypatch):
    """A folder in which a model was imported, with paths relative to it, and another one beside it to work in."""
    (tmp_path / "proj").mkdir()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "proj")
    rows = (json.dumps({"text": f"{n} sheep and {n * n} goats went over the hill."}) + "\n" for n in range(300))
    (tmp_path / "proj" / "text.jsonl").write_text("".join(rows))
    write_hf_folder("theirs", replace(MODEL, vocab_size=300))
    prepare(["text.jsonl"], "data", vocab_size=300, num_processes=1)
    (tmp_path / "proj" / "c.yaml").write_text(
        "data: {path: data, seq_len: 8}\ndevice: cpu\nwandb: {mode: disabled}\n"
        "train: {steps: 2, global_batch: 4, micro_batch: 4, eval_samples: 4}\n"
    )
    code, imported = call(capsys, "import", "theirs", "c.yaml", "run=tuned", "--json")
    assert code == 0, imported
    monkeypatch.chdir(tmp_path / "away")
    return tmp_path / "proj"


def train(config, *overrides):
    """Train in the working directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Elastic(config, *overrides, environment=environment, folder=Path.cwd()) as training:
        out, err = training.communicate(timeout=200)
    return subprocess.CompletedProcess(training.args, training.returncode, out, err)


@pytest.mark.parametrize("written", ["today", "by an earlier version"])
def test_an_imported_run_goes_on_from_its_weights_wherever_its_configuration_is_read_from(project, written):
    run = project / "runs" / "tuned"
    if written != "today":
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(f"{project}/runs", "runs").replace(f"{project}/data", "data"))
    ended = train("../proj/runs/tuned/config.yaml")
    assert ended.returncode == 0, ended.stderr
    (row,) = read_rows(run / "attempts.jsonl")
    assert (row["resumed_from"], row["first_step"], row["last_step"]) == ("disk", 1, 2)
    assert not Path("runs").exists()


def test_an_imported_run_whose_weights_are_gone_is_refused_instead_of_trained_from_random_ones(project, capsys):
    shutil.rmtree(project / "runs" / "tuned" / "checkpoints")
    config = project / "runs" / "tuned" / "config.yaml"
    ended = train(config)
    assert ended.returncode == 2, ended.stderr
    assert "would begin from random weights" in ended.stderr
    assert main(["train", str(config)]) == 2
    assert "would begin from random weights" in capsys.readouterr().err


def test_a_damaged_shard_is_named_and_nothing_that_looks_like_a_model_is_left(place, config, capsys):
    write_hf_folder(f"{place}/theirs", files=TOKENIZER)
    import_tuned(capsys, place, config)
    run = open_storage(f"{place}/runs/tuned")
    shard = next(key for key in run.list() if key.endswith(".safetensors"))
    data = bytearray(run.read(shard))
    data[-1] ^= 1
    run.write(shard, [data])
    code, message = call(capsys, "export", run.url, "--out", f"{place}/again")
    assert code == 1
    assert "is damaged: e00000000-00000.safetensors (model." in message and "--step" in message
    assert "config.json" not in open_storage(f"{place}/again").list()


def test_what_is_refused_is_refused_before_anything_is_written(tmp_path, config, capsys):
    place = str(tmp_path)
    write_hf_folder(f"{place}/theirs", files=TOKENIZER)
    (tmp_path / "text.txt").write_text("Jesus wept.\n" * 99)
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", vocab_size=300, val_fraction=0.0, num_processes=1)
    for more, part in (
        (["data.seq_len=65"], "longer than the model.max_positions=64"),
        ([f"data.path={tmp_path / 'data'}"], "was made with another tokenizer"),
    ):
        code, message = import_tuned(capsys, place, config, *more)
        assert code == 2 and part in message
    code, message = call(capsys, "import", tmp_path / "nothing", config, f"storage={place}/runs")
    assert code == 2 and "has no config.json" in message
    assert not (tmp_path / "runs").exists()


def test_an_export_without_a_checkpoint_or_a_tokenizer_says_what_is_missing(tmp_path, config, capsys):
    place = str(tmp_path)
    write_hf_folder(f"{place}/theirs")
    code, imported = import_tuned(capsys, place, config, f"data.path={tmp_path / 'moved'}")
    assert code == 0, imported
    for more, part in (
        (["--step", 5], "--step=5"),
        ([], f"data.path='{tmp_path / 'moved'}' of the run is not here"),
        (["--tokenizer", tmp_path / "theirs"], "is not here"),
    ):
        code, message = call(capsys, "export", imported["run"], "--out", tmp_path / "again", *more)
        assert code == 2 and part in message, message
    code, message = call(capsys, "export", "no-such-run", "--out", tmp_path / "again")
    assert code == 2 and "RUN=no-such-run is not a directory" in message
    assert not (tmp_path / "again").exists()
