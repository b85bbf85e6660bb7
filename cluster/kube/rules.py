"""What a field's type cannot say: the operator's own rules, and what we promise of every pod.

Source of the operator's: ray-project/kuberay@feeaf72, ray-operator/controllers/ray/utils/validation.go. Each rule is a
function of its own from the checked stream to sentences; `check_stream` runs them all.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from cluster.kube.manifests import (
    KINDS,
    ConfigMap,
    Container,
    DisruptionBudget,
    HeadGroup,
    Labels,
    Manifest,
    NetworkPolicy,
    PodTemplate,
    PriorityClass,
    RayCluster,
    RayJob,
    WorkerGroup,
)
from cluster.kube.schema import find_problems
from elastic.errors import ConfigError

_MOST_KUEUE_GROUPS = 7
"""A Kueue workload has 8 pod sets at most, and the head is one. Source: kueue, docs/tasks/run/rayjobs."""
_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY_UNITS = {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", start=1)}
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|KEY|CREDENTIALS?)$")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The documents of a stream by their kinds."""

    job: RayJob
    documents: Sequence[Manifest]

    @property
    def cluster(self) -> RayCluster:
        """The job's cluster."""
        return self.job["spec"]["rayClusterSpec"]

    @property
    def head(self) -> HeadGroup:
        """The cluster's head."""
        return self.cluster["headGroupSpec"]

    @property
    def groups(self) -> list[tuple[str, WorkerGroup]]:
        """The worker groups with their paths."""
        return [(f"workerGroupSpecs[{group['groupName']}]", group) for group in self.cluster["workerGroupSpecs"]]

    @property
    def pods(self) -> list[tuple[str, PodTemplate]]:
        """All pods with their paths."""
        pods = [("headGroupSpec.template", self.head["template"])]
        pods += [(f"{path}.template", group["template"]) for path, group in self.groups]
        return [*pods, ("submitterPodTemplate", self.job["spec"]["submitterPodTemplate"])]

    @property
    def containers(self) -> list[tuple[str, Container]]:
        """All containers with their paths."""
        return [(f"{path}[{c['name']}]", c) for path, pod in self.pods for c in pod["spec"]["containers"]]

    @property
    def is_v2(self) -> bool:
        """Whether the cluster has the newer autoscaler."""
        options = self.cluster.get("autoscalerOptions")
        return self.cluster["enableInTreeAutoscaling"] and options is not None and options["version"] == "v2"


def check_stream(documents: Sequence[Manifest]) -> None:
    """Check a rendered stream, after overrides.

    Raises:
        ConfigError: the API server or the operator would refuse it, or it would not be what we promise.
    """
    problems = [problem for document in documents for problem in _find_in_document(document)]
    if not problems:
        jobs = [document for document in documents if document["kind"] == "RayJob"]
        assert len(jobs) == 1  # overrides can only change documents
        stream = Stream(job=cast(RayJob, jobs[0]), documents=documents)
        problems = [problem for rule in RULES for problem in rule(stream)]
    if problems:
        more = f" ({len(problems) - 1} more like this.)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}")


def _find_in_document(document: Manifest) -> Iterator[str]:
    kind = str(document.get("kind"))
    if kind not in KINDS:
        yield f"kind={kind!r} is nothing that Solvent writes. Use one of: {', '.join(KINDS)}."
        return
    for problem in find_problems(document, KINDS[kind]):
        yield f"{kind}: {problem}"


# ---- the operator's


def find_bad_replicas(stream: Stream) -> Iterator[str]:
    """Keep minReplicas <= replicas <= maxReplicas."""
    for path, group in stream.groups:
        least, now, most = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if not least <= now <= most:
            yield (
                f"{path}: minReplicas={least}, replicas={now} and maxReplicas={most} must not fall. Raise maxReplicas "
                "or lower the others."
            )


def find_bad_groups(stream: Stream) -> Iterator[str]:
    """Name each group once; there must be one."""
    names = [group["groupName"] for _, group in stream.groups]
    if not names or len(set(names)) < len(names):
        yield f"workerGroupSpecs are {names}, but a cluster needs groups of different names. Rename one, or add one."


def find_bad_autoscaler(stream: Stream) -> Iterator[str]:
    """Give priority and idle time to version 2 only, and options to clusters that scale only."""
    if "autoscalerOptions" in stream.cluster and not stream.cluster["enableInTreeAutoscaling"]:
        yield "autoscalerOptions are read with enableInTreeAutoscaling: true only. Drop one of the two."
    for path, group in stream.groups:
        for key in ("priority", "idleTimeoutSeconds"):
            if group.get(key) and not stream.is_v2:
                yield f"{path}.{key} needs autoscalerOptions.version: v2. Set it, or drop {key}."
        if group.get("priority") and _get_version(stream) < (2, 56):
            yield f"{path}.priority needs rayVersion 2.56 or later, not {stream.cluster['rayVersion']}. Drop it."
    for path, container in stream.containers:
        if any(env["name"] == "RAY_enable_autoscaler_v2" for env in container.get("env", [])):
            yield f"{path}.env[RAY_enable_autoscaler_v2] contradicts autoscalerOptions.version. Drop it."


def find_bad_auth(stream: Stream) -> Iterator[str]:
    """Ask for a Ray that knows tokens."""
    if _get_version(stream) < (2, 52):
        yield f"authOptions.mode=token needs rayVersion 2.52 or later, not {stream.cluster['rayVersion']}. Raise it."


def find_bad_kueue(stream: Stream) -> Iterator[str]:
    """Leave the number of nodes to Kueue, where a queue is named."""
    if "kueue.x-k8s.io/queue-name" not in stream.job["metadata"].get("labels", {}):
        return
    if stream.cluster["enableInTreeAutoscaling"]:
        yield "a RayJob in a Kueue queue must have enableInTreeAutoscaling: false. Set it, or drop the queue's label."
    if len(stream.groups) > _MOST_KUEUE_GROUPS:
        yield f"a RayJob in a Kueue queue has {_MOST_KUEUE_GROUPS} worker groups at most, not {len(stream.groups)}."


def find_reserved_env(stream: Stream) -> Iterator[str]:
    """Leave alone what KubeRay sets itself, or takes as a switch for something else."""
    reserved = ("RAY_REDIS_ADDRESS", "REDIS_USERNAME", "REDIS_PASSWORD", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    for path, container in stream.containers:
        for env in container.get("env", []):
            if env["name"] in reserved:
                yield f"{path}.env[{env['name']}] is KubeRay's to set. Drop it; --set auth_secret=NAME names a token."


# ---- ours


def find_bad_head(stream: Stream) -> Iterator[str]:
    """Keep work away from the head, and the head away from spot nodes."""
    params = stream.head["rayStartParams"]
    if (params["num-cpus"], params["num-gpus"]) != ("0", "0"):
        yield (
            f"headGroupSpec.rayStartParams num-cpus={params['num-cpus']}, num-gpus={params['num-gpus']}: Ray would "
            "place trainers on the head, which must not go. Set both to '0'."
        )
    spot = {t["key"] for _, g in stream.groups[:1] for t in g["template"]["spec"].get("tolerations", [])}
    for toleration in stream.head["template"]["spec"].get("tolerations", []):
        if toleration["key"] in spot - {"nvidia.com/gpu"}:
            yield f"headGroupSpec tolerates {toleration['key']}, so the head may be taken back. Drop the toleration."
    if "affinity" not in stream.head["template"]["spec"]:
        yield "headGroupSpec has no affinity, so the head may be on a spot node. Leave the profile's in place."


def find_bad_grace(stream: Stream) -> Iterator[str]:
    """Tell workers the grace period that they have, and drain in less."""
    for path, group in stream.groups:
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        env = {e["name"]: e.get("value", "") for e in group["template"]["spec"]["containers"][0].get("env", [])}
        if env.get("SOLVENT_GRACE_S") != str(grace_s):
            yield (
                f"{path}: terminationGracePeriodSeconds={grace_s}, but SOLVENT_GRACE_S={env.get('SOLVENT_GRACE_S')}: "
                "trainers would plan with another time than they have. Set both alike."
            )
        drain_s = env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "")
        if not (drain_s.isdecimal() and 0 < int(drain_s) < grace_s):
            yield (
                f"{path}: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={drain_s or None} must be below "
                f"terminationGracePeriodSeconds={grace_s}, or the pod is killed while it drains. Lower it."
            )


def find_missing_token_guard(stream: Stream) -> Iterator[str]:
    """Keep the API server's token out of every pod but the head, and workers that are to watch their nodes."""
    for path, pod in stream.pods[1:]:
        env = {variable["name"] for variable in pod["spec"]["containers"][0].get("env", [])}
        watches = "NODE_NAME" in env and "serviceAccountName" in pod["spec"]
        if pod["spec"].get("automountServiceAccountToken", True) and not watches:
            yield f"{path}: a service-account token has no use there. Set automountServiceAccountToken: false."


def find_bad_security(stream: Stream) -> Iterator[str]:
    """Drop all capabilities in every container, and write no secret down."""
    for path, container in stream.containers:
        if container["securityContext"]["capabilities"]["drop"] != ["ALL"]:
            yield f"{path}.securityContext.capabilities must drop ALL. Write drop: [ALL]."
        for env in container.get("env", []):
            if ("value" in env) == ("valueFrom" in env):
                yield f"{path}.env[{env['name']}] must have one of value and valueFrom. Leave one."
            elif "value" in env and _SECRET_NAME.search(env["name"].upper()):
                yield f"{path}.env[{env['name']}] looks like a secret in plain text. Use valueFrom.secretKeyRef."


def find_bad_memory(stream: Stream) -> Iterator[str]:
    """Count /dev/shm as part of a pod's memory, and mount what is defined."""
    for path, pod in stream.pods:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            limits = container["resources"]["limits"]
            if "memory" not in limits:
                yield f"{path}[{container['name']}].resources.limits has no memory: a pod may starve its node. Add it."
                continue
            for mount in container.get("volumeMounts", []):
                volume = volumes.get(mount["name"])
                if volume is None:
                    yield f"{path}[{container['name']}] mounts {mount['name']}, which is no volume of the pod. Add it."
                elif mount["mountPath"] == "/dev/shm":
                    size = volume.get("emptyDir", {}).get("sizeLimit", "")
                    if not size or parse_quantity(size) >= parse_quantity(limits["memory"]):
                        yield (
                            f"{path}: /dev/shm has sizeLimit={size or None} and the pod {limits['memory']}, "
                            "which it counts against. Set a smaller sizeLimit, or more memory."
                        )


def find_bad_spread(stream: Stream) -> Iterator[str]:
    """Keep worker pods on nodes of their own: a lost node is then one lost pod."""
    for path, group in stream.groups:
        affinity = group["template"]["spec"].get("affinity", {})
        if not affinity.get("podAntiAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution"):
            yield f"{path} has no podAntiAffinity: several pods would be lost with one node. Leave ours in place."


def find_bad_neighbours(stream: Stream) -> Iterator[str]:
    """Fit what stands beside the RayJob to its pods."""
    labels = [pod["metadata"]["labels"] for _, pod in stream.pods]
    policies = [cast(NetworkPolicy, d) for d in stream.documents if d["kind"] == "NetworkPolicy"]
    for pod_labels in labels:
        if not any(_selects(p["spec"]["podSelector"].get("matchLabels", {}), pod_labels) for p in policies):
            yield f"no NetworkPolicy selects the pods labelled {pod_labels}: their ports are open. Leave ours in place."
    for document in stream.documents:
        if document["kind"] == "PodDisruptionBudget":
            chosen = cast(DisruptionBudget, document)["spec"]["selector"].get("matchLabels", {})
            if [_selects(chosen, pod_labels) for pod_labels in labels] != [True] + [False] * (len(labels) - 1):
                yield f"the PodDisruptionBudget selects {chosen}, which is not the head alone. Leave ours in place."
    maps = {cast(ConfigMap, d)["metadata"]["name"] for d in stream.documents if d["kind"] == "ConfigMap"}
    classes = {cast(PriorityClass, d)["metadata"]["name"] for d in stream.documents if d["kind"] == "PriorityClass"}
    for path, pod in stream.pods:
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume and volume["configMap"]["name"] not in maps:
                yield f"{path} mounts ConfigMap {volume['configMap']['name']}, which is not in the stream. Name {maps}."
        name = pod["spec"].get("priorityClassName")
        if name and name.startswith("solvent-") and name not in classes:
            yield f"{path}.priorityClassName={name} is not in the stream. Name one of {classes}, or your own."


RULES: tuple[Callable[[Stream], Iterator[str]], ...] = (
    find_bad_replicas,
    find_bad_groups,
    find_bad_autoscaler,
    find_bad_auth,
    find_bad_kueue,
    find_reserved_env,
    find_bad_head,
    find_bad_grace,
    find_missing_token_guard,
    find_bad_security,
    find_bad_memory,
    find_bad_spread,
    find_bad_neighbours,
)


def parse_quantity(text: str) -> float:
    """Return what a Kubernetes quantity means, such as 1024 for `1Ki`."""
    number = text.rstrip("mkKMGTPEi")
    unit = text[len(number) :]
    return float(number) * {"": 1.0, **_UNITS, **_BINARY_UNITS}[unit]


def _selects(selector: Labels, labels: Labels) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def _get_version(stream: Stream) -> tuple[int, ...]:
    return tuple(int(part) for part in stream.cluster["rayVersion"].split("."))
