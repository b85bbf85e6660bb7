"""`solvent submit --to kuberay` against an API server over HTTP, through the official client."""

import json

import kubernetes_validate
import pytest
import yaml

from cluster.cli import main
from cluster.kube.api import refusals
from tests.contract._kube_api import TOKEN, KubeApi
from tests.contract._kube_submission import COMMAND, NAME, Submission, api, finish, get_made, start_job

__all__ = ["api"]  # a fixture

pytest.importorskip("kubernetes")


def test_the_same_command_finds_a_job_that_kuberay_has_written_to(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    owned = [path for path in api.fields.owners["RayJob", NAME]["kuberay-operator"] if "workerGroupSpecs" in path]
    assert owned, "as on a real cluster, where to apply the same again is a conflict"
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    before = json.dumps(list(api.objects.values()))
    assert main([*COMMAND, "--detach"]) == 0
    assert json.dumps(list(api.objects.values())) == before
    assert f"{NAME} is there (Running, RUNNING) and is left as it is\n" in capsys.readouterr().err


def test_a_job_that_is_found_says_that_a_change_does_not_count_yet(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    assert main([*COMMAND, "--detach", "train.steps=900"]) == 0
    assert "what was changed since counts after --delete" in capsys.readouterr().err


def test_a_job_that_has_ended_is_submitted_again(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    api.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED")
    api.finalizer_s = 2.0
    assert main([*COMMAND, "--detach"]) == 0
    assert "status" not in api.objects["RayJob", NAME]
    assert "it is submitted again, and resumes" in capsys.readouterr().err


def test_a_run_that_has_finished_is_not_started_again_to_say_so(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    api.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
    before = dict(api.objects)
    assert main(COMMAND) == 0
    assert api.objects == before
    assert "has finished: nothing is left to train" in capsys.readouterr().err
    assert main([*COMMAND, "train.steps=900", "--detach"]) == 0
    assert "status" not in api.objects["RayJob", NAME]


def test_delete_removes_what_was_applied_but_for_what_all_runs_share(api, capsys):
    assert main([*COMMAND, "--detach"]) == 0
    api.finalizer_s = 0.3
    assert main([*COMMAND, "--delete"]) == 0
    assert {kind for kind, _ in get_made(api)} == {"PriorityClass"}
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
    policy = ("NetworkPolicy", f"{NAME}-network")
    assert main([*COMMAND, "--detach"]) == 0
    ours = api.objects[policy]
    api.update(*policy, {**ours, "spec": {**ours["spec"], "ingress": []}}, manager="kubectl-edit")
    api.drop("RayJob", NAME)


def have_an_older_kuberay(api):
    api.undeclared.add("priority")


def break_down(api):
    api.refusals["NetworkPolicy"] = (403, 'admission webhook "policy.example.com" denied the request: no', {})


@pytest.mark.parametrize(
    ("mishap", "parts"),
    [
        (lack_the_crd, ("KubeRay is not installed there", "kuberay-operator kuberay/kuberay-operator")),
        (lack_the_prometheus_operator, ("Prometheus operator is not installed", "monitor=true")),
        (forbid, ('User "ci" cannot get', "the Role that solvent render ... --rights prints", "create", "pods/log")),
        (exceed_the_quota, ("exceeded quota: gpus", "cluster.max_workers=N")),
        (lack_the_namespace, ('namespaces "default" not found', "kubectl create namespace default")),
        (have_another_version, ("unknown field", "upgrade them, or use --override")),
        (log_out, ("Unauthorized", "Log in to the cluster again")),
        (own_the_fields, ('conflict with "kubectl-edit": .spec.ingress', "--take-over")),
        (have_an_older_kuberay, ("no field .spec.rayClusterSpec.workerGroupSpecs[0].priority", "older than 1.7")),
        (break_down, ("denied the request", "A policy of the cluster forbids it")),
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
    assert main([*COMMAND, "--detach", "--take-over"]) == 0
    assert api.objects["NetworkPolicy", f"{NAME}-network"]["spec"]["ingress"]
    api.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert main([*COMMAND, "--detach", "--take-over", "--set", "backoff_limit=5"]) == 0
    assert api.objects["RayJob", NAME]["spec"]["backoffLimit"] == 5


def test_what_kubectl_applied_is_applied_again_without_a_conflict(api, capsys):
    assert main(["render", *COMMAND[1:2], *COMMAND[4:], "--profile", "generic"]) == 0
    for document in yaml.safe_load_all(capsys.readouterr().out):
        api.update(document["kind"], document["metadata"]["name"], document, manager="kubectl-client-side-apply")
    api.drop("RayJob", NAME)
    assert main([*COMMAND, "--detach"]) == 0


@pytest.mark.parametrize("held", [(), ("ConfigMap",)], ids=["nothing was there", "the ConfigMap was there"])
def test_a_refused_job_leaves_nothing_behind_that_this_command_made(api, capsys, held):
    if held:
        api.put("ConfigMap", f"{NAME}-config", {"metadata": {}, "data": {}})
    api.refuses_to_create["RayJob"] = (422, "RayJob.ray.io is invalid: spec.x: too long", {})
    assert main([*COMMAND, "--detach"]) == 1
    assert {kind for kind, _ in get_made(api)} == {"PriorityClass", *held}
    assert f"NetworkPolicy {NAME}-network deleted again" in capsys.readouterr().err


def get_rights(capsys, *words):
    """Return the rules and the PriorityClasses that `solvent render --rights` prints."""
    capsys.readouterr()
    settings = [word for word in COMMAND[4:] if word not in ("--to", "kuberay")]
    assert main(["render", COMMAND[1], *settings, *words, "--profile", "generic", "--rights"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    return documents[-1]["rules"], documents[:-1]


def test_the_role_that_render_prints_is_enough_to_submit_follow_and_delete(api, capsys):
    words = ["--set", "secret=aws", "--set", "service_account=trainer", "--set", "monitor=true"]
    api.rights, classes = get_rights(capsys, *words)
    api.put("Secret", "aws", {"metadata": {}})
    api.put("ServiceAccount", "trainer", {"metadata": {}})
    for document in classes:
        api.update(document["kind"], document["metadata"]["name"], document, manager="kubectl-client-side-apply")
    submission = Submission(*words)
    start_job(api)
    api.wait_for(lambda: "GET /api/v1/namespaces/default/events" in api.requests)
    finish(api)
    assert submission.get_code() == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["step 1 loss 5.1", "step 2 loss 5.0"]
    assert err.count("the right to get it is missing") == len(classes)  # they belong to the whole cluster
    assert main([*COMMAND, *words, "--delete"]) == 0
    assert {kind for kind, _ in get_made(api)} == {"PriorityClass", "Secret", "ServiceAccount"}


def test_workers_that_watch_their_nodes_may_do_so_with_what_render_prints(capsys):
    words = ["--set", "service_account=trainer", "--set", "node_notices=true"]
    _, others = get_rights(capsys, *words)
    made = {document["kind"]: document for document in others}
    assert made["ClusterRole"]["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    account = {"kind": "ServiceAccount", "name": "trainer", "namespace": "default"}
    for binding in ("ClusterRoleBinding", "RoleBinding"):
        assert made[binding]["subjects"] == [account]
        assert made[binding]["roleRef"]["name"] == made[made[binding]["roleRef"]["kind"]]["metadata"]["name"]
    for document in others:
        kubernetes_validate.validate(document, "1.32", strict=True)
    assert "ClusterRole" not in {document["kind"] for document in get_rights(capsys)[1]}


def test_a_right_that_is_missing_for_the_log_is_told_once_and_the_job_is_followed(api, capsys):
    rules, _ = get_rights(capsys)
    api.rights = [rule for rule in rules if rule["resources"] != ["pods/log"]]
    submission = Submission()
    start_job(api)
    finish(api)
    assert submission.get_code() == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "its log is not shown" in line]
    assert 'cannot get resource "pods/log"' in line and "get on pods/log" in line


def test_priority_classes_that_are_there_are_not_touched(api):
    assert main([*COMMAND, "--detach"]) == 0
    api.drop("RayJob", NAME)
    api.requests.clear()
    assert main([*COMMAND, "--detach"]) == 0
    assert not [request for request in api.requests if request.startswith("PATCH") and "priorityclasses" in request]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (["claim=dat"], "PersistentVolumeClaim dat"),
        (["service_account=trainer"], "ServiceAccount trainer"),
        (["secret=aws"], "Secret aws"),
        (["auth_secret=token"], "Secret token"),
    ],
    ids=["claim", "service account", "secret", "token"],
)
def test_what_the_pods_name_must_be_there_before_anything_is_applied(api, capsys, settings, missing):
    assert main([*COMMAND, "--detach", *(word for setting in settings for word in ("--set", setting))]) == 1
    assert f"namespace default has no {missing}, so no pod of the run could start" in capsys.readouterr().err
    assert get_made(api) == []


def test_an_image_pull_secret_of_an_override_must_be_there(api, capsys, tmp_path):
    fragment = {
        "kind": "RayJob",
        "spec": {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"imagePullSecrets": [{"name": "pull"}]}}}}},
    }
    (tmp_path / "fragment.yaml").write_text(yaml.safe_dump(fragment))
    assert main([*COMMAND, "--detach", "--override", str(tmp_path / "fragment.yaml")]) == 1
    assert "namespace default has no Secret pull" in capsys.readouterr().err


def test_a_server_that_is_not_well_while_a_run_is_applied_or_deleted_is_asked_again(api, monkeypatch):
    monkeypatch.setattr(refusals, "_RETRY_S", 0.1)
    api.stumbles = [None, 503, None, 500, 429, None, 502]
    assert main([*COMMAND, "--detach"]) == 0
    assert ("RayJob", NAME) in api.objects
    api.stumbles = [504, None, 500]
    assert main([*COMMAND, "--delete"]) == 0
    assert ("RayJob", NAME) not in api.objects


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
    assert main([*COMMAND, "--detach"]) == 0
    assert TOKEN not in json.dumps(list(api.objects.values()))
