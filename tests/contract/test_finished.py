"""A run that is finished and started again: one line, exit code 0, nothing started, its storage asked once."""

import json
import os
import subprocess
import sys

import pytest

from cluster.cli import main
from elastic.checkpoint.format.compat import get_computing_config
from elastic.checkpoint.format.manifest import Manifest, commit, get_directory
from elastic.config_load import load
from elastic.ports import Progress
from elastic.storage import join_url, open_storage
from tests.contract._job_api import JobApi
from tests.contract._kube_submission import COMMAND as KUBERAY
from tests.contract._kube_submission import api as kube_api  # noqa: F401 (a fixture)
from tests.contract._kube_submission import get_made
from tests.contract.test_bad_input import no_ray, read_tree  # noqa: F401 (a fixture, and what it needs)
from tests.flaky_proxy import open_proxy

STEPS = 40
CONFIG = "configs/demo.yaml"
SOLVENT = [sys.executable, "-c", "from cluster.cli import enter; enter()"]


def finish(storage, *, steps=STEPS):
    """Leave what a run that has done all its steps leaves; return the words of its command."""
    words = [f"storage={storage}", "run=mine", "data.path=/mnt/solvent/kjv", f"train.steps={steps}"]
    config = load(CONFIG, words)
    for step in (steps // 2, steps):
        manifest = Manifest(
            progress=Progress(step=step, tokens=step),
            generation=1,
            world_size=1,
            device="cpu",
            mesh=(1,),
            tensors={},
            generators={},
            files={},
            config=get_computing_config(config),
            config_hash="",
            extra={},
        )
        commit(open_storage(join_url(str(storage), "mine")), get_directory(step), manifest)
    return words


def train(*words, **environment):
    return subprocess.run(
        [*SOLVENT, "train", CONFIG, *words], check=False, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.parametrize("more", [[], [f"train.steps={STEPS - 1}"]], ids=["the same steps", "fewer steps"])
def test_it_says_so_in_one_line_without_its_data_and_touches_nothing(tmp_path, no_ray, more):  # noqa: F811
    words = [*finish(tmp_path / "runs"), *more]
    before = read_tree(tmp_path / "runs")
    result = train(*words, **no_ray)
    assert result.returncode == 0, result.stderr
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(f"finished: all steps done: {tmp_path}/runs/mine is at step {STEPS}") and "run=<new" in line
    assert read_tree(tmp_path / "runs") == before


def test_its_store_is_listed_once(s3_url, s3_environment, no_ray, monkeypatch):  # noqa: F811
    words = finish(s3_url)
    heard = []
    with open_proxy(s3_environment, rate=0.0, heard=heard) as (url, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        result = train(*words, **{**os.environ, **no_ray})
    assert result.returncode == 0, result.stderr
    assert len((result.stdout + result.stderr).splitlines()) == 1
    assert len([request for request in heard if "prefix=" in request]) == 1, heard
    assert [request for request in heard if not request.startswith("GET")] == [], "it was written to"


def test_a_job_that_is_started_again_and_again_for_it_is_never_called_fruitless(tmp_path, no_ray):  # noqa: F811
    words = finish(tmp_path)
    for _ in range(7):
        result = train(*words, "--stop-retries", **no_ray)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert len(result.stdout.splitlines()) == 1


def test_another_model_under_its_name_is_refused_all_the_same(tmp_path, no_ray):  # noqa: F811
    result = train(*finish(tmp_path), "model.dim=32", **no_ray)
    assert result.returncode == 2
    assert "this run was trained with model.dim=" in result.stderr and "run=<new name>" in result.stderr


def test_no_job_is_submitted_for_it_and_no_cluster_need_be_there(s3_url, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    words = ["submit", CONFIG, *finish(s3_url), "--to", "ray", "--working-dir", "configs", "--address"]
    with JobApi(token="a-token") as api:
        assert main([*words, api.address]) == 0
        assert api.jobs == {}
    assert main([*words, api.address, "--json"]) == 0
    line, *result = capsys.readouterr().out.splitlines()
    assert line.startswith("finished: all steps done: ")
    assert json.loads("\n".join(result))["end"] == "finished"


def test_one_that_has_steps_left_is_submitted(s3_url, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    words = [*finish(s3_url), f"train.steps={STEPS + 1}", "--to", "ray", "--working-dir", "configs", "--detach"]
    with JobApi(token="a-token") as api:
        assert main(["submit", CONFIG, *words, "--address", api.address]) == 0
        assert len(api.jobs) == 1


def test_no_rayjob_is_applied_for_it(kube_api, s3_url, capsys):  # noqa: F811
    words = finish(s3_url)
    assert main([*KUBERAY, *words]) == 0
    assert get_made(kube_api) == []
    said = capsys.readouterr()
    (line,) = (said.out + said.err).splitlines()
    assert line.startswith(f"finished: all steps done: {s3_url}/mine is at step {STEPS}")
