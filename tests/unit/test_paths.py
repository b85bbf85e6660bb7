"""A path means one thing: relative to where a run is created, whoever reads its configuration later, and from where."""

from pathlib import Path

import pytest

from cluster.cli import main
from elastic.config import CostConfig, DataConfig, RunConfig
from elastic.config_load import dump, load, load_here
from elastic.errors import ConfigError
from elastic.paths import expand_home, resolve_path
from elastic.records.rundir import RunDir


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: r\n")
    return path


def test_home_and_relative_paths_become_absolute_and_urls_stay(home):
    here = home.parent / "here"
    assert resolve_path("~/runs") == str(home / "runs")
    assert resolve_path("runs/../x") == str(here / "x")
    assert resolve_path("/a/b") == "/a/b"
    assert (resolve_path(""), resolve_path("s3://b/~/x")) == ("", "s3://b/~/x")
    assert expand_home("a~b") == "a~b"


def test_a_home_that_nobody_knows_is_refused_instead_of_becoming_a_folder(home):
    with pytest.raises(ConfigError, match=r"~nobody-at-all/x begins with a home that is not known here"):
        expand_home("~nobody-at-all/x")


@pytest.mark.parametrize("key", ["storage", "data.path", "cost.price_file", "checkpoint.node_disk"])
def test_every_path_of_a_configuration_may_begin_with_the_home(home, config, key):
    section, _, name = key.rpartition(".")
    found = load_here(config, [f"{key}=~/x"])
    assert getattr(getattr(found, section) if section else found, name) == str(home / "x")
    config.write_text(f"{section}: {{{name}: ~/y}}\n" if section else f"{name}: ~/y\n")
    found = load_here(config)
    assert getattr(getattr(found, section) if section else found, name) == str(home / "y")


def test_relative_paths_are_relative_to_the_working_directory_when_the_run_is_created(home, config):
    here = home.parent / "here"
    found = load_here(config, ["data.path=d", "cost.price_file=p.yaml"])
    assert (found.storage, found.data.path) == (str(here / "runs"), str(here / "d"))
    assert found.cost.price_file == str(here / "p.yaml")


def test_what_is_sent_elsewhere_keeps_its_paths(home, config):
    assert load(config, ["storage=runs", "data.path=~/x"]).data.path == "~/x"


def write_own(directory, *, storage, data="data", run=None):
    """A run's directory with the configuration that it was created with."""
    config = RunConfig(run=run or directory.name, storage=str(storage), data=DataConfig(path=data))
    (directory / "checkpoints" / "step-00000000").mkdir(parents=True)
    RunDir(directory).config.write_text(dump(config))
    return RunDir(directory).config


@pytest.mark.parametrize("storage", ["runs", "./runs", "a/runs"])
def test_an_earlier_version_s_run_is_found_again_from_anywhere(home, storage):
    own = write_own(home.parent / "proj" / storage / "tuned", storage=storage)
    found = load_here(Path("..") / own.relative_to(home.parent), ["train.steps=7"])
    assert found.storage == str((home.parent / "proj" / storage).resolve())
    assert found.data.path == str(home.parent / "proj" / "data")
    assert found.train.steps == 7


def test_a_run_says_where_it_is_and_is_found_from_anywhere(home):
    proj = home.parent / "proj"
    created = load_here(write_own(proj / "runs" / "tuned", storage="runs"))
    RunDir(proj / "runs" / "tuned").config.write_text(dump(created))
    assert load_here("../proj/runs/tuned/config.yaml") == created


@pytest.mark.parametrize("storage", ["/gone/runs", "../runs", "elsewhere"])
def test_a_run_that_was_moved_is_not_begun_anew_somewhere_else(home, storage):
    own = write_own(home.parent / "proj" / "runs" / "tuned", storage=storage)
    with pytest.raises(ConfigError, match=rf"was moved or copied.* Add storage={own.parent.parent} to go on"):
        load_here(own)
    assert load_here(own, [f"storage={own.parent.parent}"]).storage == str(own.parent.parent)


def test_a_run_on_an_object_store_and_a_file_that_is_no_run_s_own_are_read_as_they_are(home):
    own = write_own(home.parent / "runs" / "r", storage="s3://bucket/runs")
    assert load_here(own).storage == "s3://bucket/runs"
    (home.parent / "proj" / "checkpoints" / "step-1").mkdir(parents=True)
    (home.parent / "proj" / "config.yaml").write_text("run: r\nstorage: runs\n")
    assert load_here("../proj/config.yaml").storage == str(home.parent / "here" / "runs")


def test_overrides_of_a_run_s_own_configuration_are_relative_to_where_they_are_typed(home):
    own = write_own(home.parent / "proj" / "runs" / "r", storage="runs")
    assert load_here(own, ["data.path=d"]).data.path == str(home.parent / "here" / "d")


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "~/nowhere/r"],
        ["status", "~/nowhere/r"],
        ["train", "~/nowhere/c.yaml"],
        ["checkpoint", "ls", "~/a/b"],
    ],
)
def test_arguments_may_begin_with_the_home(home, arguments, capsys):
    assert main(arguments) == 2
    assert str(home) in capsys.readouterr().err


def test_folders_that_a_verb_makes_may_begin_with_the_home(home):
    here = home.parent / "here"
    (here / "a.txt").write_text("In the beginning. " * 200)
    (here / "b.txt").write_text("And the earth was without form. " * 100)
    options = ["--vocab-size", "300", "--val-fraction", "0.5", "--processes", "1"]
    assert main(["prepare", "a.txt", "b.txt", "--out=~/kjv", *options]) == 0
    assert (home / "kjv" / "dataset.json").exists()
    assert not Path("~").exists()


def test_prices_are_found_in_the_home(home):
    from cluster.cost import load_prices

    (home / "p.yaml").write_text("aws-g5-spot: 0.4\n")
    assert load_prices(CostConfig(price_file="~/p.yaml")).by_offer == {"aws-g5-spot": 0.4}
