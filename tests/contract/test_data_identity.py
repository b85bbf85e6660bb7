"""A run knows its data and its tokenizer: other data in the old place is noticed at every door, and can be meant."""

import json
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.cli import main
from cluster.cli.train import check_before_paying
from elastic.config_load import load
from elastic.data.preparation.prepare import prepare
from elastic.errors import DataError
from elastic.storage import open_storage
from tests.contract._hf import write_hf_folder
from tests.contract.test_bad_input import CONFIG, ELASTIC, assert_explained, call, read_tree


class Place(NamedTuple):
    """A configuration, the folder that it trains on, what was and what comes there, and a run of two steps."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "saved"

    def arguments(self, *more: str) -> list[str]:
        where = [f"storage={self.folder / 'runs'}", f"data.path={self.data}"]
        return [str(self.folder / "config.yaml"), *where, *more]

    def train(self, *more: str):
        return call(ELASTIC, *self.arguments(*more))

    def put(self, name: str) -> None:
        """Let other data be where the run's data was."""
        shutil.rmtree(self.data)
        shutil.copytree(self.folder / name, self.data)

    def read_manifest(self) -> tuple[Path, dict]:
        directory = max((self.run / "checkpoints").iterdir())
        return directory, json.loads((directory / "manifest.json").read_text())


def write_text(path: Path, words: str) -> Path:
    lines = [json.dumps({"text": f"{n} {words} and {n * n} more {words} went over the hill."}) for n in range(500)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "config.yaml").write_text(CONFIG)
    for name, words in (("sheep", "sheep"), ("ships", "old ships"), ("again", "sheep")):
        prepare([write_text(folder / f"{name}.jsonl", words)], folder / name, vocab_size=300)
    tokenizer = folder / "sheep" / "tokenizer.json"  # the same tokens for other text
    prepare([folder / "ships.jsonl"], folder / "other", tokenizer=tokenizer)
    shutil.copytree(folder / "sheep", folder / "data")
    trained = Place(folder).train()
    assert trained.returncode == 0, trained.stderr
    return Place(folder)


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ships", ("its tokens are another tokenizer's", "other training tokens")),
        ("other", ("other training tokens instead of", "other validation tokens instead of")),
    ],
)
def test_other_data_where_the_old_was_is_refused_and_harms_nothing(place, name, parts):
    place.put(name)
    before = read_tree(place.run)
    advice = ("does not hold what this run was trained on up to step 2", "run=<new name>", "data.replace=")
    with pytest.raises(DataError) as caught:  # the door of `solvent train`, before any node is claimed
        check_before_paying(load(*split(place.arguments("train.steps=4"))))
    assert [part for part in (*parts, *advice) if part not in str(caught.value)] == []
    assert_explained(place.train("train.steps=4"), *parts, *advice)
    assert read_tree(place.run) == before


def split(arguments):
    return arguments[0], arguments[1:]


def test_the_same_data_in_another_place_is_the_same_data(place):
    shutil.move(place.data, place.folder / "moved")
    result = place.train(f"data.path={place.folder / 'moved'}", "train.steps=3")
    assert result.returncode == 0, result.stderr
    assert "step 3/3" in result.stdout


def test_the_samples_of_a_step_of_a_run_can_be_looked_at(place, capsys):
    assert place.train("train.steps=3", "data.record_samples=true").returncode == 0
    (row,) = map(json.loads, next(place.run.glob("samples-*.jsonl")).read_text().splitlines())
    assert main(["data", "show", str(place.run), "--step", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (row["step"], row["ids"]) == (3, [sample["id"] for sample in found["samples"]])
    assert all("sheep" in "".join(part["text"] for part in sample["passages"]) for sample in found["samples"])


def test_data_that_was_prepared_again_from_the_same_text_is_the_same_data(place):
    place.put("again")
    result = place.train("train.steps=3")
    assert result.returncode == 0, result.stderr


def test_other_data_can_be_meant_once_and_from_then_on_it_is_the_runs_data(place):
    place.put("ships")
    refused = place.train("train.steps=4")
    (key,) = {word.rstrip(".") for word in refused.stderr.split() if word.startswith("data.replace=")}
    meant = place.train("train.steps=4", key)
    assert meant.returncode == 0, meant.stderr
    assert "from step 2 on this run goes on with other data" in meant.stderr
    later = place.train("train.steps=5")
    assert later.returncode == 0, later.stderr
    place.put("other")
    assert_explained(place.train("train.steps=6", key), "does not hold what this run was trained on up to step 5")


def test_an_export_has_the_tokenizer_that_the_run_was_trained_with_whatever_lies_at_its_data_path_now(place, capsys):
    own = (place.data / "tokenizer.json").read_bytes()
    place.put("ships")
    assert main(["checkpoint", "export", str(place.run), "--out", str(place.folder / "hf")]) == 0
    assert (place.folder / "hf" / "tokenizer.json").read_bytes() == own
    shutil.rmtree(place.data)
    assert main(["checkpoint", "export", str(place.run), "--out", str(place.folder / "hf2")]) == 0
    assert (place.folder / "hf2" / "tokenizer.json").read_bytes() == own
    code = main(
        [
            "checkpoint",
            "export",
            str(place.run),
            "--out",
            str(place.folder / "hf3"),
            "--tokenizer",
            str(place.folder / "ships"),
        ]
    )
    assert code == 2
    assert "has another tokenizer than this checkpoint was trained with" in capsys.readouterr().err


def test_a_run_has_its_tokenizer_from_the_first_step_on(place):
    (kept,) = (place.run / "data").iterdir()
    for name in ("tokenizer.json", "dataset.json"):
        assert (kept / name).read_bytes() == (place.data / name).read_bytes()


def forget_data(place):
    """Write the newest manifest as older versions did."""
    directory, manifest = place.read_manifest()
    del manifest["config"]["data.identity"]
    data = json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(data)
    (directory / "COMMITTED").write_text(f"crc32:{zlib.crc32(data):08x}")
    shutil.rmtree(place.run / "data")


def test_a_run_that_older_code_has_trained_goes_on_and_is_told_once_that_its_data_is_taken_on_trust(place, capsys):
    forget_data(place)
    assert main(["checkpoint", "export", str(place.run), "--out", str(place.folder / "hf")]) == 0
    assert "does not say which tokenizer it was trained with" in capsys.readouterr().err
    told = "does not say which data it was trained on"
    first, second = place.train("train.steps=3"), place.train("train.steps=4")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert told in first.stderr and told not in second.stderr
    place.put("ships")
    assert place.train("train.steps=5").returncode == 2


def test_what_an_import_refuses_the_next_command_refuses_too(place):
    """The data comes after the import, so only training can compare the two."""
    model = load(*split(place.arguments())).model
    write_hf_folder(str(place.folder / "theirs"), model, files={"tokenizer.json": b'{"not": "read"}'})
    arguments = place.arguments("run=tuned", "data.seq_len=4", f"data.path={place.folder / 'later'}")
    assert main(["checkpoint", "import", str(place.folder / "theirs"), *arguments]) == 0
    shutil.copytree(place.data, place.folder / "later")
    assert_explained(
        call(ELASTIC, place.folder / "runs" / "tuned" / "config.yaml"),
        "does not hold what this run was trained on up to step 0",
        "its tokens are another tokenizer's",
    )


def test_a_model_of_others_is_not_imported_for_data_with_ids_beyond_its_embedding(place, capsys):
    write_hf_folder(str(place.folder / "theirs"))  # 16 rows
    arguments = place.arguments("run=tuned", "data.seq_len=4")
    assert main(["checkpoint", "import", str(place.folder / "theirs"), *arguments]) == 2
    assert "model.vocab_size=16 is too small" in capsys.readouterr().err
    assert not (place.folder / "runs" / "tuned").exists()


def test_a_finished_run_that_is_given_more_steps_says_that_its_learning_rate_jumps(place):
    result = place.train("train.steps=40")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "the learning rate jumps" in line]
    # cosine over 2 steps ends at a tenth of 1e-3; the third of 40 steps has 0.1 + 0.9 * (1 + cos(pi * 3/40)) / 2 of it
    assert "0.0001 at the last update, 0.000988 at the next one" in line
    with (place.run / "metrics.jsonl").open() as rows:
        third = next(row for row in map(json.loads, rows) if row["step"] == 3)
    assert third["lr"] == pytest.approx(0.000988, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_done_all_steps_that_it_is_given_says_so(place, steps):
    result = place.train(f"train.steps={steps}")
    assert result.returncode == 0, result.stderr
    assert f"train.steps={steps}, and this run has done 2: there is nothing left to train" in result.stderr


@pytest.fixture(scope="module")
def longer(made, tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("longer") / "place"
    shutil.copytree(made.folder, folder)
    assert Place(folder).train("train.steps=3").returncode == 0
    return Place(folder)


@pytest.mark.parametrize(
    "form", ["{run}/checkpoints/{name}", "{run}/checkpoints/{name}/", "file://{run}/checkpoints/{name}"]
)
@pytest.mark.parametrize("verb", ["verify", "ls"])
def test_a_checkpoint_may_be_named_by_its_path(longer, capsys, verb, form):
    place = longer
    path = form.format(run=place.run, name="step-00000002")
    assert main(["checkpoint", verb, path, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["name"], row["state"]) == ("step-00000002", "whole")
    assert main(["checkpoint", verb, str(place.run / "checkpoints" / "step-00000009")]) == 2
    assert "step-00000003" in capsys.readouterr().err
    assert main(["checkpoint", verb, str(place.run / "checkpoints"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checkpoints"]) == 2


def test_an_export_takes_the_path_of_a_checkpoint_as_well(place, capsys):
    path = place.run / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "export", str(path), "--out", str(place.folder / "hf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_a_run_trains_to_its_end_on_data_without_validation_and_says_that_it_has_none(place):
    prepare([place.folder / "sheep.jsonl"], place.folder / "all", vocab_size=300, val_fraction=0.0)
    more = [f"data.path={place.folder / 'all'}", "run=all", "train.eval_every_steps=1"]
    check_before_paying(load(*split(place.arguments(*more))))
    result = place.train(*more)
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert "train.eval_every_steps=1 has no effect" in result.stderr
    rows = open_storage(place.folder / "runs" / "all").read("metrics.jsonl").splitlines()
    assert not any("val_loss" in json.loads(row) for row in rows)
