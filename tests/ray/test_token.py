"""`RAY_ADDRESS=HOST:PORT solvent train`, where the cluster wants a token: with it, with another one, with none."""

import subprocess
import time

import pytest

from tests.ray._rented import SOLVENT_COMMAND, open_head
from tests.ray._runs import Run


@pytest.fixture(scope="module")
def rented():
    with open_head(timeout_s=60) as rented:
        yield rented


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HOME": "elsewhere"}, "this cluster lets nobody in without its token, and there is none here"),
        ({"HOME": "elsewhere", "RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token, but there is no token here"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the one in RAY_AUTH_TOKEN is another"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled keeps Ray from showing one"),
    ],
    ids=["none", "none but asked for", "wrong", "off"],
)
def test_without_the_token_of_the_cluster_training_is_refused_at_once_in_one_line(rented, data, tmp_path, env, words):
    if "HOME" in env:
        env = {**env, "HOME": str(tmp_path)}
    run = Run(rented, data, tmp_path)
    start_s = time.monotonic()
    done = run_train(run, env)
    assert done.returncode == 2, done.stdout
    assert words in done.stdout
    assert "Traceback" not in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1, done.stdout
    assert time.monotonic() - start_s < 15  # Ray alone takes 20 s, after its import


def run_train(run, env):
    """Start the driver with this environment and wait for its end."""
    run.start().kill()  # for its configuration
    run.driver.wait()
    changes = [f"{key}={value}" for key, value in run.overrides.items()]
    return subprocess.run(
        [*SOLVENT_COMMAND, "train", run.storage / "tiny.yaml", *changes],
        env={**run.nodes.driver_env, "RAY_ADDRESS": run.nodes.address, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=run.storage,
        timeout=120,
    )


def test_with_its_token_in_the_home_folder_it_just_works(rented, data, tmp_path):
    rented.join()
    run = Run(rented, data, tmp_path, **{"train.steps": 5, "cluster.max_workers": 1})
    run.start()
    assert run.wait(timeout_s=300) == 0, run.get_output()
