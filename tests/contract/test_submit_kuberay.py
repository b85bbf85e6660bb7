"""`solvent submit --to kuberay` against an API server over HTTP, through the official client."""

import json
import threading

import pytest

from cluster.cli import main
from tests.contract._kube_api import KubeApi

pytest.importorskip("kubernetes")
NAME = "mine"
COMMAND = ["submit", "configs/demo.yaml", "--to", "kuberay", f"run={NAME}", "storage=s3://bucket/runs"]
COMMAND += ["data.path=/mnt/solvent/kjv", "--set", "image=registry.example.com/solvent:0.1.0", "--set", "claim=data"]


@pytest.fixture
def api(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with KubeApi() as api:
        api.write_kubeconfig(tmp_path / "kubeconfig")
        yield api


class Submission:
    """A submission in a thread, beside a test that plays KubeRay."""

    def __init__(self, *words):
        self.code = None
        self.thread = threading.Thread(target=self.run, args=(words,))
        self.thread.start()

    def run(self, words):
        self.code = main([*COMMAND, *words])

    def get_code(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.code


def start_job(api, pod="mine-abc12"):
    api.wait_for(lambda: ("RayJob", NAME) in api.objects and api.told_version >= api.version)
    api.set_status(NAME, jobDeploymentStatus="Initializing")
    api.wait_for(lambda: api.told_version >= api.version)
    api.put("Pod", pod, {"metadata": {"labels": {"job-name": NAME}}, "status": {"phase": "Running"}})
    api.add_log(pod, "step 1 loss 5.1", "step 2 loss 5.0")
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    api.wait_for(lambda: f"GET /api/v1/namespaces/default/pods/{pod}/log" in api.requests)


def end_pod(api, pod="mine-abc12"):
    api.put("Pod", pod, {**api.objects["Pod", pod], "status": {"phase": "Succeeded"}})


def test_a_run_is_applied_followed_through_its_states_and_ends_with_0(api, capsys):
    submission = Submission()
    start_job(api)
    api.add_log("mine-abc12", "step 3 loss 4.9")
    end_pod(api)
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
    assert submission.get_code() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0", "step 3 loss 4.9"]
    for state in ("waiting for KubeRay", "Initializing", "Running, RUNNING", "Complete, SUCCEEDED"):
        assert f"{NAME}: {state}\n" in err
    kinds = [kind for kind, _ in api.objects]
    assert kinds[:6] == [
        "PriorityClass",
        "PriorityClass",
        "ConfigMap",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "RayJob",
    ]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"reason": "AppFailed", "message": "Job entrypoint command failed with exit code 2, last logs: ..."}, 2),
        ({"reason": "AppFailed", "message": "Job entrypoint command failed with exit code 3, last logs: ..."}, 3),
        ({"reason": "AppFailed", "message": "Job entrypoint command failed with exit code 137, last logs: ..."}, 1),
        ({"reason": "DeadlineExceeded", "message": "The RayJob has passed the activeDeadlineSeconds."}, 1),
    ],
    ids=["wrong input", "interrupted", "killed", "deadline"],
)
def test_a_job_that_failed_returns_the_code_of_the_run_and_the_reason(api, capsys, status, code):
    submission = Submission("--json")
    start_job(api)
    end_pod(api)
    api.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED", failed=3, **status)
    assert submission.get_code() == code
    result = json.loads(capsys.readouterr().out)
    assert (result["job"], result["end"], result["attempts"]) == (NAME, "failed", 3)
    assert status["reason"] in result["reason"] and status["message"] in result["reason"]


def test_connections_that_break_lose_no_news_and_repeat_no_line(api, capsys):
    submission = Submission()
    api.cuts = {"watch": 2, "log": 1}
    api.forget_versions = True
    start_job(api)
    api.wait_for(lambda: api.num_lines == 2)
    api.cuts["log"] += 1
    api.add_log("mine-abc12", *(f"step {step}" for step in range(3, 40)))
    end_pod(api)
    api.wait_for(lambda: not any(api.cuts.values()))
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
    assert submission.get_code() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0", *(f"step {step}" for step in range(3, 40))]
    assert "Trying again" in err


def test_the_log_of_each_attempt_is_shown(api, capsys):
    submission = Submission()
    start_job(api, "mine-first")
    end_pod(api, "mine-first")
    api.set_status(NAME, jobDeploymentStatus="Retrying", failed=1)
    api.put("Pod", "mine-second", {"metadata": {"labels": {"job-name": NAME}}, "status": {"phase": "Succeeded"}})
    api.add_log("mine-second", "resumed at step 3")
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
    assert submission.get_code() == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "resumed at step 3"
    assert "failed attempts: 1" in err


def test_the_same_command_finds_a_job_that_runs_and_resumes_one_that_has_ended(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert main([*COMMAND, "--detach"]) == 0
    assert api.objects["RayJob", NAME]["status"]["jobDeploymentStatus"] == "Running"
    api.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED")
    api.finalizer_s = 2.0
    assert main([*COMMAND, "--detach"]) == 0
    assert "status" not in api.objects["RayJob", NAME]
    assert "it is submitted again, and resumes" in capsys.readouterr().err


def test_a_job_that_is_deleted_elsewhere_ends_as_interrupted(api):
    submission = Submission()
    start_job(api)
    end_pod(api)
    api.drop("RayJob", NAME)
    assert submission.get_code() == 3


def test_delete_removes_what_was_applied_but_for_what_all_runs_share(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    api.finalizer_s = 0.3
    assert main([*COMMAND, "--delete"]) == 0
    assert {kind for kind, _ in api.objects} == {"PriorityClass"}
    assert main([*COMMAND, "--delete"]) == 0
    assert f"RayJob {NAME} was not there" in capsys.readouterr().err


def lack_the_crd(api):
    api.missing.add("RayJob")


def lack_the_prometheus_operator(api):
    api.missing.add("PodMonitor")


def forbid(api):
    api.refusals["RayJob"] = (403, 'rayjobs.ray.io is forbidden: User "ci" cannot get resource "rayjobs"', {})


def exceed_the_quota(api):
    api.refusals["RayJob"] = (403, 'rayjobs.ray.io "mine" is forbidden: exceeded quota: gpus', {"name": NAME})


def lack_the_namespace(api):
    details = {"name": "default", "kind": "namespaces"}
    api.refusals["ConfigMap"] = (404, 'namespaces "default" not found', details)


def have_another_version(api):
    api.refusals["RayJob"] = (422, "RayJob.ray.io is invalid: spec.preRunningDeadlineSeconds: unknown field", {})


def log_out(api):
    api.refusals["RayJob"] = (401, "Unauthorized", {})


def own_the_fields(api):
    assert main([*COMMAND, "--detach"]) == 0
    api.owned_by_others = True


@pytest.mark.parametrize(
    ("mishap", "parts"),
    [
        (lack_the_crd, ("KubeRay is not installed there", "helm install kuberay-operator")),
        (lack_the_prometheus_operator, ("Prometheus operator is not installed", "monitor=true")),
        (forbid, ('User "ci" cannot get', "Ask for the right to get, list, watch, patch and delete rayjobs")),
        (exceed_the_quota, ("exceeded quota: gpus", "cluster.max_workers=N")),
        (lack_the_namespace, ('namespaces "default" not found', "kubectl create namespace default")),
        (have_another_version, ("unknown field", "upgrade them, or use --override")),
        (log_out, ("Unauthorized", "Log in to the cluster again")),
        (own_the_fields, ("conflict", "--take-over")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refusal_is_one_line_that_says_what_to_do(api, capsys, mishap, parts):
    mishap(api)
    capsys.readouterr()
    assert main([*COMMAND, "--detach", "--set", "monitor=true"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("solvent: ")]
    assert [part for part in parts if part not in line] == [], line


def test_fields_of_others_are_taken_over_on_request(api):
    own_the_fields(api)
    assert main([*COMMAND, "--detach", "--take-over", "--set", "backoff_limit=5"]) == 0
    assert api.objects["RayJob", NAME]["spec"]["backoffLimit"] == 5


def test_no_cluster_is_one_line_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main([*COMMAND, "--detach"]) == 1
    assert "no cluster is configured" in capsys.readouterr().err
    with KubeApi() as gone:
        gone.write_kubeconfig(tmp_path / "none")
    assert main([*COMMAND, "--detach"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_what_renders_no_rayjob_is_refused_before_any_cluster_is_asked(capsys):
    assert main([*COMMAND, "--profile", "dstack"]) == 2
    assert "is not for KubeRay" in capsys.readouterr().err


def test_the_token_of_the_kubeconfig_is_in_nothing_that_is_applied(api):
    from tests.contract._kube_api import TOKEN

    assert main([*COMMAND, "--detach"]) == 0
    assert TOKEN not in json.dumps(list(api.objects.values()))
