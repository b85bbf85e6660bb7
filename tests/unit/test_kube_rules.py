"""Every rule of a stream broken once, and every way to ask for something that cannot work."""

import copy

import pytest
import yaml

from cluster.kube import rules
from cluster.kube.options import parse_options
from cluster.kube.override import read_overrides
from cluster.kube.render import render
from cluster.kube.rules import check_stream
from elastic.config import ClusterConfig, DataConfig, RunConfig, SourceConfig, WandbConfig
from elastic.errors import ConfigError

SETTINGS = ["image=registry.example.com/solvent:0.1.0", "claim=data"]


def make_config(**fields):
    data = DataConfig(path="/mnt/solvent/data")
    cluster = ClusterConfig(min_workers=2, max_workers=4, gpus_per_worker=1)
    return RunConfig(**{"run": "mine", "storage": "s3://bucket/runs", "data": data, "cluster": cluster, **fields})


@pytest.fixture(scope="module")
def streams():
    return {
        "": render(make_config(), "gke-spot", parse_options(SETTINGS)),
        "queue": render(make_config(), "gke-spot", parse_options([*SETTINGS, "queue=team"])),
    }


def find(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


def set_at(document, path, value):
    """Set (or, with ..., remove) the field at a path such as `spec/suspend`; ~ stands for / in a key."""
    *keys, last = (key.replace("~", "/") for key in path.split("/"))
    for key in keys:
        document = document[int(key) if isinstance(document, list) else key]
    last = int(last) if isinstance(document, list) else last
    if value is ...:
        del document[last]
    else:
        document[last] = value


CLUSTER = "spec/rayClusterSpec"
SPOT = f"{CLUSTER}/workerGroupSpecs/0"
POD = f"{SPOT}/template/spec"
HEAD = f"{CLUSTER}/headGroupSpec"
SUBMITTER = "spec/submitterPodTemplate"
SPOT_TOLERATION = {"key": "cloud.google.com/gke-spot", "operator": "Exists"}

# (what is changed, to what, what the message says), each in the stream of plain options.
MUTANTS = [
    # the operator's rules
    ("metadata/name", "m" * 48, "48 characters; 47 are the most"),
    ("metadata/name", "9-lives", "must match"),
    ("spec/shutdownAfterJobFinishes", ..., "shutdownAfterJobFinishes is missing"),
    ("spec/shutdownAfterJobFinishes", False, "must be True"),
    ("spec/deletionStrategy", {}, "no such field"),
    ("spec/ttlSecondsAfterFinished", -1, "between 0 and"),
    (f"{POD}/restartPolicy", "Always", "must be 'Never'"),
    (f"{HEAD}/template/spec/restartPolicy", "OnFailure", "must be 'Never'"),
    (f"{CLUSTER}/autoscalerOptions/version", "v1", "priority needs autoscalerOptions.version: v2"),
    (f"{CLUSTER}/autoscalerOptions", ..., "needs autoscalerOptions.version: v2"),
    (f"{CLUSTER}/enableInTreeAutoscaling", False, "autoscalerOptions are read with"),
    (f"{CLUSTER}/rayVersion", "2.55.1", "priority needs rayVersion 2.56"),
    (f"{CLUSTER}/rayVersion", "2.51.0", "rayVersion"),
    (f"{SPOT}/minReplicas", 9, "must not fall"),
    (f"{SPOT}/replicas", 9, "must not fall"),
    (f"{SPOT}/maxReplicas", ..., "maxReplicas is missing"),
    (f"{SPOT}/maxReplicas", 2**31, "between 0 and"),
    (f"{SPOT}/groupName", "on-demand", "groups of different names"),
    (f"{CLUSTER}/workerGroupSpecs", [], "groups of different names"),
    (f"{SPOT}/rayStartParams/labels", "a=b", "no such field"),
    (f"{SPOT}/resources", {"GPU": "1"}, "no such field"),
    (f"{POD}/containers/0/env/0", {"name": "RAY_enable_autoscaler_v2", "value": "1"}, "contradicts"),
    (f"{HEAD}/template/spec/containers/0/env", [{"name": "RAY_REDIS_ADDRESS", "value": "a"}], "KubeRay's to set"),
    ("spec/activeDeadlineSeconds", 0, "between 1 and"),
    ("spec/preRunningDeadlineSeconds", 0, "between 1 and"),
    ("spec/backoffLimit", -1, "between 0 and"),
    ("spec/submissionMode", "InteractiveMode", "must be 'K8sJobMode'"),
    (f"{POD}/containers/0/resources/requests/cpu", 0.5, "must be of type str, in quotes"),
    # ours
    (f"{HEAD}/rayStartParams/num-cpus", "4", "place trainers on the head"),
    (f"{HEAD}/rayStartParams/num-gpus", "1", "place trainers on the head"),
    (f"{HEAD}/template/spec/tolerations", [SPOT_TOLERATION], "the head may be taken back"),
    (f"{HEAD}/template/spec/affinity", ..., "the head may be on a spot node"),
    (f"{HEAD}/serviceType", "LoadBalancer", "must be 'ClusterIP'"),
    (f"{HEAD}/enableIngress", True, "no such field"),
    (f"{CLUSTER}/authOptions/mode", "disabled", "must be 'token'"),
    (f"{CLUSTER}/authOptions", ..., "authOptions is missing"),
    (f"{POD}/terminationGracePeriodSeconds", 20, "SOLVENT_GRACE_S=15"),
    (f"{POD}/containers/0/env/2/value", "15", "must be below terminationGracePeriodSeconds=15"),
    (f"{POD}/containers/0/env/2", ..., "must be below"),
    (f"{POD}/automountServiceAccountToken", True, "has no use there"),
    (f"{POD}/automountServiceAccountToken", ..., "has no use there"),
    (f"{SUBMITTER}/spec/automountServiceAccountToken", ..., "has no use there"),
    (f"{POD}/securityContext/runAsNonRoot", False, "must be True"),
    (f"{POD}/securityContext/runAsUser", 0, "between 1 and"),
    (f"{POD}/securityContext/seccompProfile/type", "Unconfined", "must be 'RuntimeDefault'"),
    (f"{POD}/containers/0/securityContext/capabilities/drop", [], "must drop ALL"),
    (f"{POD}/containers/0/securityContext/privileged", True, "no such field"),
    (f"{POD}/containers/0/securityContext/allowPrivilegeEscalation", True, "must be False"),
    (f"{POD}/hostNetwork", True, "no such field"),
    (f"{POD}/containers/0/env/1", {"name": "WANDB_API_KEY", "value": "x"}, "looks like a secret"),
    (f"{POD}/containers/0/env/1", {"name": "NCCL_DEBUG"}, "one of value and valueFrom"),
    (f"{POD}/containers/0/image", "solvent:latest", "must match"),
    (f"{POD}/containers/0/image", "solvent", "must match"),
    (f"{POD}/containers/0/livenessProbe", {}, "no such field"),
    (f"{POD}/containers/0/resources/limits", {}, "has no memory"),
    (f"{POD}/volumes/0/emptyDir/sizeLimit", "9999Gi", "which it counts against"),
    (f"{POD}/volumes/0/emptyDir/sizeLimit", ..., "which it counts against"),
    (f"{POD}/containers/0/volumeMounts/0/name", "shn", "is no volume of the pod"),
    (f"{POD}/affinity/podAntiAffinity", ..., "several pods would be lost"),
    (f"{POD}/priorityClassName", "solvent-wroker", "is not in the stream"),
    (f"{HEAD}/template/spec/volumes/0/configMap/name", "other", "which is not in the stream"),
    (f"{SPOT}/template/metadata/labels/solvent.dev~run", "other", "their ports are open"),
]


@pytest.mark.parametrize(("path", "value", "said"), MUTANTS)
def test_a_job_that_breaks_a_rule_is_refused(streams, path, value, said):
    documents = copy.deepcopy(streams[""])
    job = find(documents, "RayJob")
    set_at(job, path, value)
    with pytest.raises(ConfigError) as error:
        check_stream(documents)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (f"{CLUSTER}/enableInTreeAutoscaling", True, "Kueue queue must have enableInTreeAutoscaling: false"),
        (f"{CLUSTER}/workerGroupSpecs", "eight", "7 worker groups at most, not 8"),
    ],
)
def test_a_queued_job_that_breaks_a_rule_is_refused(streams, path, value, said):
    documents = copy.deepcopy(streams["queue"])
    job = find(documents, "RayJob")
    if value == "eight":
        group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        value = [{**group, "groupName": f"group-{number}"} for number in range(8)]
    set_at(job, path, value)
    with pytest.raises(ConfigError) as error:
        check_stream(documents)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("NetworkPolicy", "spec/podSelector/matchLabels", {"a": "b"}, "their ports are open"),
        ("NetworkPolicy", "spec/policyTypes", ["Egress"], "must be 'Ingress'"),
        ("PodDisruptionBudget", "spec/selector/matchLabels", {"solvent.dev/run": "mine"}, "not the head alone"),
        ("PodDisruptionBudget", "spec/minAvailable", "50%", "must be of type int"),
        ("PriorityClass", "preemptionPolicy", "Always", "must be"),
        ("ConfigMap", "data/config.yaml", 5, "must be of type str"),
    ],
)
def test_what_stands_beside_the_job_is_checked_too(streams, kind, path, value, said):
    documents = copy.deepcopy(streams[""])
    set_at(find(documents, kind), path, value)
    with pytest.raises(ConfigError) as error:
        check_stream(documents)
    assert said in str(error.value)


def test_the_streams_themselves_are_good(streams):
    for documents in streams.values():
        check_stream(documents)


def test_every_rule_is_broken_by_some_mutant(streams):
    caught = set()
    for path, value, _ in MUTANTS:
        documents = copy.deepcopy(streams[""])
        job = find(documents, "RayJob")
        set_at(job, path, value)
        stream = rules.Stream(job=job, documents=documents)
        for rule in rules.RULES:
            try:
                caught |= {rule.__name__} if list(rule(stream)) else set()
            except (KeyError, TypeError, ValueError, IndexError):  # the types refuse such a job before a rule sees it
                continue
    # The last two are broken above: one by a queued job, one by what stands beside the job.
    assert caught | {"find_bad_kueue", "find_bad_neighbours"} == {rule.__name__ for rule in rules.RULES}


# (fields of the configuration, settings, what the message says)
REQUESTS = [
    ({}, ["node_notices=true"], "needs a service account that may read nodes"),
    ({}, ["image="], "there is no image to start"),
    ({}, ["image=solvent"], "must match"),
    ({}, ["image=solvent:latest"], "must match"),
    ({"storage": "runs"}, [], "storage=runs would be in a container"),
    ({"storage": "/mnt/solvent-old/runs"}, [], "would be in a container"),
    ({"storage": "/mnt/solvent/../runs"}, [], "would be in a container"),
    ({"storage": "https://bucket/runs"}, [], "would be in a container"),
    ({"storage": "file:///mnt/solvent/runs"}, [], "would be in a container"),
    ({"storage": "/mnt/solvent/runs"}, ["claim="], "Set storage=s3://BUCKET/runs"),
    ({"data": DataConfig(path="data/kjv")}, [], "data.path='data/kjv' is not in a container"),
    ({"data": DataConfig(path="ftp://host/data")}, [], "data.path='ftp://host/data' is not in a container"),
    (
        {"data": DataConfig(sources={"web": SourceConfig(path="data/web")})},
        [],
        "data.sources.web.path='data/web' is not in a container",
    ),
    ({}, ["claim="], "is not in a container"),
    ({}, ["claim_path=mnt"], "no absolute path"),
    ({}, ["claim_path=/mnt/../etc"], "no absolute path"),
    ({"storage": "s3://key:pass@bucket/runs"}, [], "storage has a secret in it"),
    ({"storage": "s3://bucket/runs?secret=x"}, [], "storage has a secret in it (secret)"),
    ({"wandb": WandbConfig(mode="online")}, [], "needs WANDB_API_KEY"),
    ({}, ["gpus_per_node=0"], "must be between 1 and"),
    ({}, ["gpus_per_node=two"], "must be a whole number"),
    ({"cluster": ClusterConfig(max_workers=2)}, ["gpus_per_node=8"], "GPUs would be paid for and idle"),
    ({}, ["gpus_per_node=8", "cpus_per_node=4"], "so nothing fits there"),
    ({}, ["memory_gib_per_node=1"], "leaves nothing beside"),
    ({}, ["spot_nodes=0", "on_demand_nodes=1"], "fewer than the 2 node(s)"),
    ({}, ["queue=team", "spot_nodes=1"], "fewer than the 2 node(s)"),
    ({}, ["spot_nodes=-2"], "must be between -1 and"),
    ({}, ["monitor=yes"], "must be true or false"),
    ({}, ["imag=x"], "Did you mean image?"),
    ({}, ["monitor"], "has no value"),
    ({}, ["backoff_limit=-1"], "must be between 0 and"),
    ({}, ["active_deadline_s=0"], "must be between 1 and"),
    ({}, ["namespace=Team_A"], "namespace='Team_A' must match"),
    ({}, ["queue=team a"], "must match"),
    ({}, ["secret=My Secret"], "must match"),
    ({}, ["auth_secret=-x"], "must match"),
    ({}, ["service_account=a_b"], "must match"),
    ({}, ["gpu=NVIDIA L4"], "must match"),
    ({}, ["secret_env=KEY=value"], "takes names of environment variables only"),
]


@pytest.mark.parametrize(("fields", "settings", "said"), REQUESTS, ids=range(len(REQUESTS)))
def test_what_cannot_work_is_refused_with_the_reason_and_the_fix(fields, settings, said):
    with pytest.raises(ConfigError) as error:
        render(make_config(**fields), "gke-spot", parse_options([*SETTINGS, *settings]))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("profile", "settings", "said"),
    [
        ("gke-spt", [], 'Did you mean "gke_spot"?'),
        ("skypilot", [], "Which GPU"),
        ("skypilot", ["gpu=L4", "image=solvent:latest"], "image_id"),
        ("skypilot", ["gpu=L4", "secret=keys"], "--set secret=keys is read by Kubernetes profiles only"),
        ("dstack", ["queue=team"], "read by Kubernetes profiles only"),
        ("dstack", ["claim=s3://bucket/data"], "must match"),
        ("dstack", ["spot_nodes=1"], "training would never start"),
        ("dstack", ["gpu=two words"], "must match"),
    ],
)
def test_a_profile_refuses_what_it_cannot_do(profile, settings, said):
    with pytest.raises(ConfigError) as error:
        render(make_config(), profile, parse_options([*SETTINGS, *settings]))
    assert said.lower() in str(error.value).lower()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: RayJobs", "names 0 documents, not one. There are: PriorityClass solvent-head"),
        ("{kind: RayJob, metadata: {name: other}}", "names 0 documents"),
        ("kind: PriorityClass", "names 2 documents"),
        ("spec: {}", "has a fragment without kind"),
        ("- kind: RayJob", "has a fragment without kind"),
        ("kind: RayJob\nkind: RayJob", "is there twice"),
        ("kind: [", "cannot be read"),
        ("!!python/object/apply:os.system [id]", "cannot be read"),
        ("{kind: RayJob, spec: {rayClusterSpec: {workerGroupSpecs: [{groupName: spto}]}}}", "Did you mean spot?"),
        ("{kind: RayJob, spec: {rayClusterSpec: {headGroupSpec: {enableIngress: true}}}}", "no such field"),
        ("{kind: RayJob, spec: {entrypoint: 5}}", "must be of type str"),
        (
            "{kind: RayJob, spec: {rayClusterSpec: {workerGroupSpecs: [{groupName: spot, maxReplica: 4}]}}}",
            "[spot].maxReplica: there is no such field in what Solvent writes. Did you mean maxReplicas?",
        ),
    ],
)
def test_an_override_that_changes_nothing_known_is_refused(tmp_path, text, said):
    path = tmp_path / "override.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        render(make_config(), "gke-spot", parse_options(SETTINGS), fragments=read_overrides(path))
    assert said in str(error.value)


def test_an_override_for_a_task_is_refused():
    fragment = yaml.safe_load("kind: RayJob")
    with pytest.raises(ConfigError, match="writes none"):
        render(make_config(), "dstack", parse_options(SETTINGS), fragments=[fragment])
