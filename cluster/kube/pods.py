"""The three pods of a run: head, worker and submitter."""

from cluster.kube.clouds import Capacity, Cloud, require_nodes
from cluster.kube.manifests import (
    Affinity,
    Container,
    ContainerSecurity,
    Env,
    Labels,
    PodSecurity,
    PodSpec,
    PodTemplate,
    Requirements,
    Resources,
    Toleration,
    Volume,
    VolumeMount,
)
from cluster.kube.options import Options
from cluster.kube.sizing import Sizes
from cluster.notices import get_drain_s
from cluster.types import RAY_HEAD_ENV

RUN_LABEL = "solvent.dev/run"
ROLE_LABEL = "solvent.dev/role"
HEAD_PRIORITY = "solvent-head"
WORKER_PRIORITY = "solvent-worker"
CONFIG_FOLDER = "/etc/solvent"
_HEAD_GRACE_S = 30
"""While it trains, a head stays for as long as its workers may need it to save together."""
_MOST_WAIT_S = _HEAD_GRACE_S - 4
_SUBMITTER_GRACE_S = 5
"""It has nothing to save, and its process 1 is a shell that ignores SIGTERM as well."""
DRIVER_MARK = "--stop-retries"
"""By this option of its command the head's hook knows that the driver still runs."""
_END_HEAD = (
    f"n=0; while [ $n -lt {_MOST_WAIT_S} ] && grep -qs -e '[-]{DRIVER_MARK[1:]}' /proc/[0-9]*/cmdline; "
    "do sleep 1; n=$((n+1)); done; "
    'for p in /proc/[0-9]*; do read -r name 2>/dev/null < "$p/comm" && [ "$name" = gcs_server ] && '
    'kill -9 "${p#/proc/}"; done; true'
)
"""SIGKILL: `ray start --block` takes a SIGTERM of its processes for a stop that somebody else sees to, and stays."""
AUTOSCALER_COMMAND = "trap 'exit 0' TERM; $KUBERAY_GEN_AUTOSCALER_START_CMD & wait $!"
"""Process 1 of the autoscaler's container, which else ignores SIGTERM for the whole grace period."""
USER_ID = 1000
"""k8s/Dockerfile makes this user."""
_NOTICE_FILE = "/tmp/solvent-notice"
_GPU_TAINT: Toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def get_container_security() -> ContainerSecurity:
    """Return what every container gets."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def build_head(name: str, options: Options, cloud: Cloud, *, is_autoscaling: bool) -> PodTemplate:
    """Return the head's pod: driver and coordinator, on a node that stays.

    Its process 1 is a shell that ignores SIGTERM, so each head would be paid for until SIGKILL. The preStop hook waits
    for the driver alone, and then ends Ray's first process; with it `ray start --block` ends, and so does the shell.
    """
    container: Container = {
        "name": "ray-head",
        "image": options.image,
        "env": [{"name": name, "value": value} for name, value in RAY_HEAD_ENV.items()],
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "metrics", "containerPort": 8080},
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", _END_HEAD]}}},
        "resources": _require(cpus=options.head_cpus, memory_gib=options.head_memory_gib),
        "securityContext": get_container_security(),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *_mount_claim(options),
        ],
    }
    spec = _build_spec(options, container, grace_s=_HEAD_GRACE_S, priority=HEAD_PRIORITY)
    spec["affinity"] = {"nodeAffinity": require_nodes(cloud.on_demand)}
    spec["tolerations"] = list(cloud.on_demand.tolerations)
    spec["volumes"] = [{"name": "config", "configMap": {"name": f"{name}-config"}}, _build_shm(512), *_claim(options)]
    if not is_autoscaling:  # the autoscaler beside the head is all that talks to the API server
        spec["automountServiceAccountToken"] = False
    return {"metadata": {"labels": _get_labels(name, "head", options, cloud)}, "spec": spec}


def build_worker(name: str, options: Options, cloud: Cloud, capacity: Capacity, sizes: Sizes) -> PodTemplate:
    """Return a worker's pod: one per node, with all of the node's GPUs that were asked for.

    Ray's own SIGTERM handling does not help here: KubeRay starts Ray below a shell, and a shell that is process 1 does
    not pass the signal on. So the preStop hook, which runs at the start of the grace period, writes a notice file for
    the node watch (cluster/providers/plain.py) and returns at once.
    """
    gpus = options.gpus_per_node if sizes.uses_gpus else 0
    drain_s = int(get_drain_s(cloud.grace_s))
    env: list[Env] = [
        {"name": "SOLVENT_GRACE_S", "value": str(cloud.grace_s)},
        {"name": "SOLVENT_NOTICE_FILE", "value": _NOTICE_FILE},
        {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(drain_s)},
    ]
    if options.node_notices:
        env.append({"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    container: Container = {
        "name": "ray-worker",
        "image": options.image,
        "env": env,
        "ports": [{"name": "metrics", "containerPort": 8080}],
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", f'echo {drain_s} > "$SOLVENT_NOTICE_FILE"']}}},
        "resources": _require(cpus=sizes.cpus, memory_gib=sizes.memory_gib, gpus=gpus),
        "securityContext": get_container_security(),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *_mount_claim(options)],
    }
    spec = _build_spec(options, container, grace_s=cloud.grace_s, priority=WORKER_PRIORITY)
    spec["automountServiceAccountToken"] = options.node_notices
    spec["affinity"] = _spread_over_nodes(capacity)
    if options.gpu:
        spec["nodeSelector"] = {cloud.gpu_label: options.gpu}
    spec["tolerations"] = [*capacity.tolerations, *([_GPU_TAINT] if gpus else [])]
    spec["volumes"] = [_build_shm(sizes.shm_mib), *_claim(options)]
    return {"metadata": {"labels": _get_labels(name, "worker", options, cloud)}, "spec": spec}


def build_submitter(name: str, options: Options, cloud: Cloud) -> PodTemplate:
    """Return the pod that hands the job to the head and shows its log; KubeRay fills in its command."""
    container: Container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": get_container_security(),
    }
    spec = _build_spec(options, container, grace_s=_SUBMITTER_GRACE_S, priority=HEAD_PRIORITY)
    spec["automountServiceAccountToken"] = False
    spec["affinity"] = {"nodeAffinity": require_nodes(cloud.on_demand)}
    spec["tolerations"] = list(cloud.on_demand.tolerations)
    return {"metadata": {"labels": _get_labels(name, "submitter", options, cloud)}, "spec": spec}


def _build_spec(options: Options, container: Container, *, grace_s: int, priority: str) -> PodSpec:
    security: PodSecurity = {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if options.secret and container["name"] != "ray-job-submitter":
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    spec: PodSpec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "priorityClassName": priority,
        "securityContext": security,
        "containers": [container],
    }
    if options.service_account and container["name"] != "ray-job-submitter":
        spec["serviceAccountName"] = options.service_account
    return spec


def _require(*, cpus: int, memory_gib: int, gpus: int = 0) -> Resources:
    """Ask for what may be used, but let idle cores be used: only memory and GPUs are limited."""
    limits: Requirements = {"memory": f"{memory_gib}Gi"}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    return {"requests": {"cpu": str(cpus), **limits}, "limits": limits.copy()}


def _spread_over_nodes(capacity: Capacity) -> Affinity:
    """Admit nodes of this capacity that hold no other Ray pod: a lost node is then one lost worker pod, never two."""
    return {
        "nodeAffinity": require_nodes(capacity),
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {
                    "labelSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
                    "topologyKey": "kubernetes.io/hostname",
                }
            ]
        },
    }


def _get_labels(name: str, role: str, options: Options, cloud: Cloud) -> Labels:
    identity = cloud.identity_labels if options.service_account else {}
    return {RUN_LABEL: name, ROLE_LABEL: role, **identity}


def _build_shm(mib: int) -> Volume:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{mib}Mi"}}


def _claim(options: Options) -> list[Volume]:
    return [{"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}}] if options.claim else []


def _mount_claim(options: Options) -> list[VolumeMount]:
    return [{"name": "shared", "mountPath": options.claim_path}] if options.claim else []
