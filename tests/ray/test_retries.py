"""The entrypoint of a Ray job that is tried again, on a real head without any node to train on; and that head's end."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from cluster.kube.options import Options
from cluster.kube.render import render
from elastic.config import ClusterConfig, DataConfig, RunConfig
from tests.ray._nodes import get_env
from tests.ray._rented import SOLVENT_COMMAND, get_free_ports, open_head
from tests.ray._runs import TINY
from tests.ray._traces import wait_until

pytestmark = pytest.mark.long

NEW_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture(scope="module")
def head():
    with open_head() as head:
        yield head


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fields = {**TINY, "run": "r", "storage": str(folder / "runs"), "data": {**TINY["data"], "path": str(data)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    return folder / "config.yaml"


def ask(head, path, body=None):
    request = urllib.request.Request(f"http://127.0.0.1:{head.dashboard_port}/api/jobs/{path}")
    request.add_header("Authorization", f"Bearer {head.token}")
    if body:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def run_job(head, *words):
    """Run `solvent train ... --stop-retries` as a job, and return its end and its log."""
    command = shlex.join([*SOLVENT_COMMAND, "train", *map(str, words), "--stop-retries"])
    job = ask(head, "", {"entrypoint": command})["submission_id"]
    ended = ("SUCCEEDED", "FAILED", "STOPPED")
    wait_until(lambda: ask(head, job)["status"] in ended, timeout_s=150, what=lambda: ask(head, f"{job}/logs")["logs"])
    time.sleep(2)  # whoever would still overrule it has had the time
    return ask(head, job), ask(head, f"{job}/logs")["logs"]


def test_wrong_input_stops_the_job_with_the_reason_as_its_message(head, config):
    job, log = run_job(head, config, "data.path=/nowhere", "run=wrong")
    assert job["status"] == "STOPPED", job
    assert job["message"].startswith("solvent ended this job for good: failed with exit code 2: data.path='/nowhere'")
    assert "solvent: data.path='/nowhere' does not exist" in log


def test_a_head_without_a_driver_ends_long_before_its_grace_period_does():
    if subprocess.run([*NEW_NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("a PID namespace of its own needs root")
    config = RunConfig(
        run="r",
        storage="/mnt/solvent/runs",
        data=DataConfig(path="/mnt/solvent/data"),
        cluster=ClusterConfig(min_workers=1, max_workers=2),
    )
    options = Options(image="registry.example.com/solvent:0.1.0", claim="data")
    spec = render(config, "generic", options)[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    (port,) = get_free_ports(1)
    ray = f"{sys.executable} -m ray.scripts.scripts start --head --block --port={port} --num-cpus=0"
    script = f"ulimit -n 65536; {ray} --include-dashboard=false --disable-usage-stats --temp-dir={folder}/ray; true"
    with (folder / "pod.log").open("wb") as log:
        pod = subprocess.Popen(
            [*NEW_NAMESPACE, "/bin/bash", "-c", "--", script], env=get_env(folder), stdout=log, stderr=log
        )
    try:
        text = (folder / "pod.log").read_text
        wait_until(lambda: "Ray runtime started" in text(), timeout_s=90, what=text)
        (first,) = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
        start_s = time.monotonic()
        subprocess.run(["nsenter", "--target", first, "--pid", "--mount", *hook], check=True)
        os.kill(int(first), signal.SIGTERM)  # a shell that is process 1 does not hear it
        pod.wait(20)
        assert time.monotonic() - start_s < spec["terminationGracePeriodSeconds"] / 2
    finally:
        pod.kill()
        pod.wait()
        shutil.rmtree(folder)
