"""A pod's end as Kubernetes does it, to real processes: preStop hook, SIGTERM to process 1, grace period, SIGKILL.

Each pod is a PID namespace with a shell as process 1, as KubeRay starts Ray: the shell passes no signal on, and its end
is the end of all. Environment, hook and grace period are those that `solvent render` writes for the profile.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.kube.options import Options
from cluster.kube.render import render
from elastic.config import ClusterConfig, DataConfig, RunConfig
from elastic.records.rundir import parse_utc, read_rows
from tests.ray._nodes import Nodes, get_env
from tests.ray._runs import Run
from tests.ray._traces import assert_nothing_left

pytestmark = pytest.mark.long

PROFILES = {"eks-spot": 120, "generic": 30, "aks-spot": 25, "gke-spot": 15}
"""Longest first: its period runs out while the others have theirs."""
MOST_GRACE_S = 45
"""SIGKILL comes this early to a pod that would have two minutes: harder than life, and sooner over."""
NEW_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def render_worker(profile: str) -> dict:
    config = RunConfig(
        run="r",
        storage="/mnt/solvent/runs",
        data=DataConfig(path="/mnt/solvent/data"),
        cluster=ClusterConfig(min_workers=1, max_workers=2),
    )
    options = Options(image="registry.example.com/solvent:0.1.0", claim="data")
    return render(config, profile, options)[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]


class Pod:
    """One worker pod; `delete` ends it as the kubelet does, in a thread."""

    def __init__(self, nodes: Nodes, profile: str) -> None:
        spec = render_worker(profile)
        (container,) = spec["containers"]
        self.grace_s: int = spec["terminationGracePeriodSeconds"]
        self._hook = container["lifecycle"]["preStop"]["exec"]["command"]
        own = {variable["name"]: variable["value"] for variable in container["env"]}
        own |= {"SOLVENT_NOTICE_FILE": str(nodes.folder / f"notice-{profile}"), "KUBERNETES_SERVICE_HOST": "127.0.0.1"}
        self._env = {**get_env(nodes.folder), **own}
        ray = f"{sys.executable} -m ray.scripts.scripts start --block --address={nodes.address} --num-cpus=1"
        script = f"ulimit -n 65536; {ray} --object-store-memory=100000000 --disable-usage-stats; true"
        with (nodes.folder / f"pod-{profile}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*NEW_NAMESPACE, "/bin/bash", "-c", "--", script], env=self._env, stdout=log, stderr=log
            )
        self.deleted_s = 0.0
        self.ended_s = 0.0
        self._thread = threading.Thread(target=self._delete, daemon=True)

    def delete(self) -> None:
        self.deleted_s = time.time()
        self._thread.start()

    def wait(self) -> None:
        if self.deleted_s:
            self._thread.join(self.grace_s + 10)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _delete(self) -> None:
        subprocess.run(self._hook, env=self._env, check=True)
        (first,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        try:
            self._process.wait(self.deleted_s + min(self.grace_s, MOST_GRACE_S) - time.time())
        except subprocess.TimeoutExpired:
            os.kill(int(first), signal.SIGKILL)
            self._process.wait()
        self.ended_s = time.time()


@pytest.fixture(scope="module")
def ended(data, tmp_path_factory):
    """The directory of a run that lost a pod of every profile, and the pods."""
    if subprocess.run([*NEW_NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("a PID namespace of its own needs root")
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    nodes = Nodes(folder, num_nodes=1, is_measured=True)
    pods: dict[str, Pod] = {}
    overrides = {"train.steps": 100_000, "checkpoint.every_steps": 100_000, "cluster.max_workers": 2}
    run = Run(nodes, data, tmp_path_factory.mktemp("pods"), **overrides)
    try:
        run.start()
        for profile in PROFILES:
            pods[profile] = Pod(nodes, profile)
            run.wait_for(lambda: (run.last_row() or {}).get("world_size") == 2, timeout_s=150, what="the pod trains")
            run.wait_for_step(run.last_row()["step"] + 10)
            pods[profile].delete()
            run.wait_for_step(0, world_size=1)
        run.driver.send_signal(signal.SIGINT)
        assert run.wait() == 3, run.get_output()
        for pod in pods.values():
            pod.wait()
        print(run.get_output())  # shown if a test fails
        yield run.dir, pods
    finally:
        for pod in pods.values():
            pod.kill()
        if run.driver and run.driver.poll() is None:
            run.driver.kill()
        for path in [*folder.glob("pod-*.log"), *folder.glob("notice-*")]:
            path.unlink()
        nodes.close()
        for left in folder.glob("solvent-*"):  # of a host that was killed with its pod: its container takes that along
            shutil.rmtree(left)
        shutil.rmtree(folder / "ray", ignore_errors=True)
        assert_nothing_left(folder, timeout_s=30)
        shutil.rmtree(folder)


def test_no_step_is_lost_with_a_pod_of_any_profile(ended):
    run_dir, _ = ended
    attempts = list(read_rows(run_dir.attempts))
    assert [row["lost_steps"] for row in attempts] == [0] * len(attempts)
    assert {row["end"] for row in attempts} == {"interrupted"}
    for before, after in pairwise(attempts):
        assert after["first_step"] == before["last_step"] + 1
    left = [row["reason"] for row in attempts if "notice file" in row["reason"]]
    assert left == [f"plain: notice file notice-{profile}" for profile in PROFILES]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_state_is_safe_and_others_train_on_before_the_grace_period_ends(ended, profile):
    run_dir, pods = ended
    pod = pods[profile]
    assert pod.grace_s == PROFILES[profile]
    alone = [row for row in read_rows(run_dir.metrics) if row["world_size"] == 1]
    first_s = next(s for row in alone if (s := parse_utc(row["time_utc"])) > pod.deleted_s)
    assert first_s - pod.deleted_s < min(pod.grace_s, MOST_GRACE_S)
    assert pod.ended_s - pod.deleted_s < min(pod.grace_s, MOST_GRACE_S) + 3
