"""A run that trains on a mixture: what it refuses when it goes on, what may change from a named step on."""

import json

import pytest

from cluster.cli import main
from cluster.cli.train import check_before_paying
from elastic.checkpoint.format.compat import get_data
from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.config_load import load
from elastic.data.kept import read_kept
from elastic.data.preparation.prepare import prepare
from elastic.errors import ConfigError, DataError
from elastic.storage import open_storage
from tests.contract.test_bad_input import CONFIG, ELASTIC, call
from tests.contract.test_data_identity import write_text

WEIGHTS = ("data.sources.web.weight=0.7", "data.sources.code.weight=0.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three prepared folders with one tokenizer, and a run that has trained on two of them for 3 steps."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "config.yaml").write_text(CONFIG)
    prepare([write_text(folder / "web.jsonl", "sheep")], folder / "web", vocab_size=300)
    for name in ("code", "math", "other"):
        text = write_text(folder / f"{name}.jsonl", f"old {name}")
        prepare([text], folder / name, tokenizer=folder / "web" / "tokenizer.json", val_fraction=0.1)
    prepare([folder / "math.jsonl"], folder / "strange", vocab_size=290)
    trained = call(ELASTIC, *arguments(folder, "data.record_samples=true"))
    assert trained.returncode == 0, trained.stderr
    return folder


def arguments(folder, *more, weights=WEIGHTS, code="code"):
    paths = (f"data.sources.web.path={folder / 'web'}", f"data.sources.code.path={folder / code}")
    own = (f"storage={folder / 'runs'}", "run=mixed", "train.steps=3", "train.global_batch=8")
    return [str(folder / "config.yaml"), *own, *paths, *weights, *more]


def check(folder, *more, **changes):
    config, *overrides = arguments(folder, "train.steps=5", *more, **changes)
    return check_before_paying(load(config, overrides))


def read_samples(folder):
    files = sorted((folder / "runs" / "mixed").glob("samples-*.jsonl"))
    return {row["step"]: row["ids"] for file in files for row in map(json.loads, file.read_text().splitlines())}


def test_the_samples_of_a_step_are_of_the_sources_that_the_weights_say(folder, capsys):
    ids = read_samples(folder)
    run = str(folder / "runs" / "mixed")
    of = {"web": 0, "code": 0}
    for step in (1, 2, 3):
        assert main(["data", "show", run, "--step", str(step), "--json"]) == 0
        samples = json.loads(capsys.readouterr().out)["samples"]
        assert [sample["id"] for sample in samples] == ids[step]
        for sample in samples:
            text = "".join(passage["text"] for passage in sample["passages"])
            assert ("old" if sample["source"] == "web" else "sheep") not in text
            of[sample["source"]] += 1
    assert of == {"web": 17, "code": 7}  # 24 * 0.7 = 16.8


def test_the_epochs_are_told_before_the_run_and_by_ls(folder, capsys):
    told = check(folder)  # 40 samples
    assert told.startswith("web: 70.0% of the samples, 28 of ") and "; code: 30.0% of the samples, 12 of " in told
    assert main(["data", "ls", *arguments(folder, "train.steps=5")]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": ("data.sources.web.weight=0.8", "data.sources.code.weight=0.2")},
        {"more": ("data.phases.p.from_step=3", "data.phases.p.weights.code=1")},  # of the 3 that were done
        {"more": ("data.phases.p.from_tokens=1", "data.phases.p.weights.code=1")},
    ],
)
def test_another_mixture_of_what_was_trained_on_is_refused(folder, changes):
    with pytest.raises(ConfigError) as caught:
        check(folder, *changes.pop("more", ()), **changes)
    told = ("up to step 3 this run was trained on a mixture of", "data.phases.NAME.from_step=4", "run=<new name>")
    assert [words for words in told if words not in str(caught.value)] == []


def test_other_data_in_a_source_is_refused(folder):
    with pytest.raises(DataError, match="other data in the source code"):
        check(folder, code="other")


def test_a_mixture_in_place_of_the_one_folder_is_refused(folder):
    config, *overrides = arguments(folder, f"data.path={folder / 'web'}", "train.steps=5")
    overrides = [one for one in overrides if not one.startswith("data.sources")]
    with pytest.raises(DataError, match="does not hold what this run was trained on"):
        check_before_paying(load(config, overrides))


def test_the_same_weights_in_other_words_are_the_same_mixture(folder):
    check(folder, weights=("data.sources.web.weight=14", "data.sources.code.weight=6"))


def test_sources_of_two_tokenizers_are_refused(folder):
    with pytest.raises(DataError, match=r"data\.sources\.code\.path=.*has another tokenizer_sha256"):
        check(folder, "run=new", code="strange")


def test_the_tokenizer_of_a_mixture_is_kept_with_the_run(folder):
    storage = open_storage(folder / "runs" / "mixed")
    identity = get_data(read_manifest(storage, list_committed(storage)[-1]))
    kept = read_kept(storage, identity)
    assert kept.tokenizer_json == (folder / "web" / "tokenizer.json").read_bytes()
    assert set(identity.sources) == {"web", "code"} and kept.info.train.num_tokens == identity.train_tokens


def test_from_a_named_step_on_a_run_goes_on_with_another_mixture_and_a_source_more(folder, capsys):
    before = read_samples(folder)
    own = (f"data.sources.math.path={folder / 'math'}", "data.sources.math.weight=0", "data.record_samples=true")
    phase = ("data.phases.late.from_step=5", "data.phases.late.weights.math=1", "train.steps=6")
    result = call(ELASTIC, *arguments(folder, *own, *phase))
    assert result.returncode == 0, result.stderr
    assert "data.mixture:" in result.stderr  # what has changed is told
    after = read_samples(folder)
    assert {step: after[step] for step in before} == before
    assert main(["data", "show", str(folder / "runs" / "mixed"), "--step", "5", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [(sample["id"], sample["source"]) for sample in samples] == [(id_, "math") for id_ in after[5]]
