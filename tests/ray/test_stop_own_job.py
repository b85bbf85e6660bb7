"""A driver that ends its own Ray job for good, against Ray's real store of jobs (GCS) without any node."""

import asyncio
import base64
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient, JobStatus

from tests.ray._rented import SOLVENT_COMMAND, get_free_ports

JOB = "mine-x7k2p"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gcs")
    (port,) = get_free_ports(1)
    command = [str(Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"), f"--gcs_server_port={port}"]
    command += [f"--log_dir={folder}", f"--config_list={base64.b64encode(b'{}').decode()}", "--metrics-agent-port=-1"]
    command += ["--node-ip-address=127.0.0.1", "--session-name=s", "--ray-commit=x"]
    with (folder / "gcs.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + 30
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < deadline_s, (folder / "gcs.log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def is_up(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def in_store(address, act):
    """Await what `act` does with the store of jobs."""

    async def run():
        return await act(JobInfoStorageClient(GcsClient(address=address)))

    return asyncio.run(run())


def drive(address, *words, storage):
    """Run the entrypoint as Ray's supervisor of jobs does."""
    job = json.dumps({"metadata": {"job_submission_id": JOB}})
    command = [*SOLVENT_COMMAND, "train", "configs/demo.yaml", f"storage={storage}", *words, "--stop-retries"]
    env = {**os.environ, "RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_wrong_input_stops_the_job_with_the_reason_and_rays_supervisor_cannot_overrule_it(address, tmp_path):
    in_store(address, lambda jobs: jobs.put_info(JOB, JobInfo(status=JobStatus.RUNNING, entrypoint="solvent train")))
    ended = drive(address, "data.path=/nowhere", storage=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "solvent: data.path='/nowhere' does not exist" in ended.stderr

    job = in_store(address, lambda jobs: jobs.get_info(JOB))
    assert job.status == JobStatus.STOPPED
    assert "failed with exit code 2: data.path='/nowhere' does not exist" in job.message
    with pytest.raises(RuntimeError, match="terminal state"):  # what it does on an exit code that is not 0
        in_store(address, lambda jobs: jobs.put_status(JOB, JobStatus.FAILED, driver_exit_code=2))
    assert in_store(address, lambda jobs: jobs.get_status(JOB)) == JobStatus.STOPPED


def test_outside_of_a_job_the_option_changes_no_exit_code(tmp_path):
    command = [*SOLVENT_COMMAND, "train", "configs/demo.yaml", f"storage={tmp_path}", "data.path=/nowhere"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run([*command, "--stop-retries"], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "not the entrypoint of a Ray job" in ended.stderr
