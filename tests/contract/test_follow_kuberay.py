"""A RayJob that is followed from its first state to its last, over real HTTP, through what goes wrong between."""

import json

import pytest

from cluster.kube.api import job_warnings, server
from tests.contract._kube_submission import NAME, Submission, api, end_pod, finish, get_made, start_job
from tests.unit.test_log_lines import RAYS

pytest.importorskip("kubernetes")
__all__ = ["api"]  # a fixture


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
    assert [kind for kind, _ in get_made(api)] == [
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
    assert "trying again" in err


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


def test_a_job_that_is_deleted_elsewhere_ends_as_interrupted(api):
    submission = Submission()
    start_job(api)
    end_pod(api)
    api.drop("RayJob", NAME)
    assert submission.get_code() == 3


def test_an_api_server_that_is_away_for_some_seconds_does_not_end_the_command(api, capsys):
    submission = Submission()
    start_job(api)
    api.go_away(4.0)
    api.add_log("mine-abc12", "step 3 loss 4.9")
    api.wait_for(lambda: api.told_version >= api.version)
    finish(api)
    assert submission.get_code() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0", "step 3 loss 4.9"]
    assert "The job goes on; trying again" in err


def test_a_server_that_is_overloaded_does_not_end_the_command(api, capsys):
    submission = Submission()
    start_job(api)
    api.stumbles = [429, 500, 503]
    api.forget_versions = True
    api.cuts["watch"] = 1
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING", message="news")
    api.wait_for(lambda: not api.stumbles, timeout_s=60)
    finish(api)
    assert submission.get_code(60) == 0
    assert capsys.readouterr().out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0"]


@pytest.mark.parametrize(("code", "said"), [(401, "Log in"), (403, "Role"), (404, "KubeRay is not installed")])
def test_a_refusal_ends_the_command(api, capsys, code, said):
    submission = Submission()
    start_job(api)
    api.refusals["RayJob"] = (code, 'User "ci" cannot list resource "rayjobs"', {})
    api.cuts["watch"] = 1
    api.set_status(NAME, message="news")
    assert submission.get_code() == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_log_that_falls_silent_without_an_end_is_read_on_within_seconds(api, capsys, monkeypatch):
    assert server.LOG_SILENT_S <= 10
    monkeypatch.setattr(server, "LOG_SILENT_S", 2)
    api.silences["log"] = 2
    submission = Submission()
    start_job(api)
    api.wait_for(lambda: not api.silences["log"])
    api.add_log("mine-abc12", "step 3 loss 4.9")
    api.wait_for(lambda: api.num_lines >= 3, timeout_s=15)
    finish(api)
    assert submission.get_code() == 0
    assert capsys.readouterr().out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0", "step 3 loss 4.9"]


def test_the_last_lines_are_shown_even_if_the_log_is_silent_when_the_job_ends(api, capsys):
    api.silences["log"] = 1
    submission = Submission()
    start_job(api)
    api.wait_for(lambda: not api.silences["log"])
    api.add_log("mine-abc12", "step 3 loss 4.9", "finished")
    finish(api)
    assert submission.get_code() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["step 3 loss 4.9", "finished"]


def test_a_watch_that_falls_silent_without_an_end_is_noticed(api, monkeypatch):
    assert server.WATCH_S <= 30
    monkeypatch.setattr(server, "WATCH_S", 3)
    api.silences["watch"] = 1
    submission = Submission()
    api.wait_for(lambda: ("RayJob", NAME) in api.objects and not api.silences["watch"])
    api.put("Pod", "mine-abc12", {"metadata": {"labels": {"job-name": NAME}}, "status": {"phase": "Running"}})
    finish(api)
    assert submission.get_code(20) == 0


def test_the_log_of_a_job_that_was_never_seen_running_is_shown(api, capsys):
    submission = Submission()
    api.wait_for(lambda: ("RayJob", NAME) in api.objects and api.told_version >= api.version)
    api.put("Pod", "mine-abc12", {"metadata": {"labels": {"job-name": NAME}}, "status": {"phase": "Running"}})
    api.add_log("mine-abc12", "solvent: data.path=/nowhere does not exist")
    end_pod(api)
    message = "solvent ended this job for good: failed with exit code 2: data.path=/nowhere does not exist"
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="STOPPED", message=message)
    assert submission.get_code() == 2
    out, err = capsys.readouterr()
    assert "data.path=/nowhere does not exist" in out
    assert "data.path=/nowhere does not exist" in err


def test_lines_of_one_moment_are_shown_once_each(api, capsys):
    submission = Submission()
    start_job(api)
    with api.changed:
        api.logs["mine-abc12"] += [f"2026-11-24T00:00:09.5Z part {part}" for part in range(5)]
        api.changed.notify_all()
    api.wait_for(lambda: api.num_lines >= 7)
    api.cuts["log"] = 1
    api.add_log("mine-abc12", "cut")
    with api.changed:
        api.logs["mine-abc12"][-1] = "2026-11-24T00:00:09.5Z part 5"
    api.wait_for(lambda: not api.cuts["log"])
    finish(api)
    assert submission.get_code() == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"part {part}" for part in range(6)]


def test_colors_bars_and_rays_own_tracebacks_are_not_shown_where_no_terminal_is(api, capsys):
    submission = Submission()
    start_job(api)
    api.add_log("mine-abc12", "\x1b[36m(autoscaler)\x1b[0m Resized", " 10%|#\r100%|##| 2/2", *RAYS)
    finish(api)
    assert submission.get_code() == 0
    *_, resized, bar, lost = capsys.readouterr().out.splitlines()
    assert (resized, bar) == ("(autoscaler) Resized", "100%|##| 2/2")
    assert lost.startswith("(the job's log broke off at the head: ") and "ClientConnectorError" in lost


def test_why_a_job_does_not_start_is_told_from_the_clusters_warnings(api, capsys, monkeypatch):
    assert job_warnings.EVERY_S <= 10
    monkeypatch.setattr(job_warnings, "EVERY_S", 1)
    api.warn("RayCluster", "mine-xyz89", "FailedToCreateHeadPod", "of an older job", time_utc="2026-11-23T00:00:00Z")
    submission = Submission()
    start_job(api)
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    for _ in range(2):
        api.warn("Pod", "mine-xyz89-spot-worker-abcde", "FailedScheduling", said)
    api.warn("PersistentVolumeClaim", "data", "ProvisioningFailed", 'storageclass "fast" not found')
    api.warn("Pod", "mine-other-xyz12-head", "FailedScheduling", "of another run")
    api.warn("Job", "mine", "FailedCreate", 'error looking up service account default/trainer: "trainer" not found')
    asked = api.requests.count("GET /api/v1/namespaces/default/events")
    api.wait_for(lambda: api.requests.count("GET /api/v1/namespaces/default/events") >= asked + 2)
    finish(api)
    assert submission.get_code() == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert lines == [
        f"mine: warning: Pod mine-xyz89-spot-worker-abcde: FailedScheduling: {said}",
        'mine: warning: PersistentVolumeClaim data: ProvisioningFailed: storageclass "fast" not found',
        'mine: warning: Job mine: FailedCreate: error looking up service account default/trainer: "trainer" not found',
    ]
