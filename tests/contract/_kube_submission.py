"""`solvent submit --to kuberay` in a thread, beside a test that plays KubeRay."""

import threading

import pytest

from cluster.cli import main
from tests.contract._kube_api import KubeApi

NAME = "mine"
COMMAND = ["submit", "configs/demo.yaml", "--to", "kuberay", f"run={NAME}", "storage=s3://bucket/runs"]
COMMAND += ["data.path=/mnt/solvent/kjv", "--set", "image=registry.example.com/solvent:0.1.0", "--set", "claim=data"]


class Submission:
    """A submission that follows its job."""

    def __init__(self, *words):
        self.code = None
        self.thread = threading.Thread(target=self.run, args=(words,))
        self.thread.start()

    def run(self, words):
        self.code = main([*COMMAND, *words])

    def get_code(self, timeout_s=30):
        self.thread.join(timeout_s)
        assert not self.thread.is_alive()
        return self.code


def start_job(api, pod="mine-abc12"):
    api.wait_for(lambda: ("RayJob", NAME) in api.objects and api.told_version >= api.version)
    api.set_status(NAME, jobDeploymentStatus="Initializing", rayClusterName="mine-xyz89")
    api.wait_for(lambda: api.told_version >= api.version)
    api.put("Pod", pod, {"metadata": {"labels": {"job-name": NAME}}, "status": {"phase": "Running"}})
    api.add_log(pod, "step 1 loss 5.1", "step 2 loss 5.0")
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    api.wait_for(lambda: f"GET /api/v1/namespaces/default/pods/{pod}/log" in api.requests)


def end_pod(api, pod="mine-abc12"):
    api.put("Pod", pod, {**api.objects["Pod", pod], "status": {"phase": "Succeeded"}})


def finish(api):
    end_pod(api)
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)


@pytest.fixture
def api(tmp_path, monkeypatch):
    """An API server that the kubeconfig of the process names, with the claim that the command wants."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with KubeApi() as api:
        api.put("PersistentVolumeClaim", "data", {"metadata": {}})
        api.write_kubeconfig(tmp_path / "kubeconfig")
        yield api


def get_made(api):
    """Return what was applied, in its order."""
    return [key for key in api.objects if key[0] not in ("PersistentVolumeClaim", "Pod", "Event")]
