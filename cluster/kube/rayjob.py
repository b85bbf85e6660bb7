"""The stream for a Kubernetes with KubeRay: one RayJob and what must stand beside it.

The RayJob makes a cluster per attempt; the entrypoint resumes the run, so that any number of attempts is one run.
"""

from collections.abc import Mapping
from typing import Any, cast

from cluster.kube.clouds import Capacity, Cloud
from cluster.kube.manifests import (
    AutoscalerOptions,
    ConfigMap,
    DisruptionBudget,
    IngressRule,
    Labels,
    Manifest,
    NetworkPolicy,
    PodMonitor,
    PriorityClass,
    RayCluster,
    RayJob,
    RayJobSpec,
    StartParams,
    WorkerGroup,
)
from cluster.kube.names import get_job_name
from cluster.kube.options import Options
from cluster.kube.pod_files import check_placement
from cluster.kube.pods import (
    AUTOSCALER_COMMAND,
    CONFIG_FOLDER,
    DRIVER_MARK,
    HEAD_PRIORITY,
    ROLE_LABEL,
    RUN_LABEL,
    WORKER_PRIORITY,
    build_head,
    build_submitter,
    build_worker,
    get_container_security,
)
from cluster.kube.sizing import OBJECT_STORE_BYTES, Sizes, plan_sizes
from elastic.config import RunConfig
from elastic.errors import ConfigError

RAY_VERSION = "2.60.0"
"""Of the image; the runtime refuses any other."""
SPOT_GROUP = "spot"
ON_DEMAND_GROUP = "on-demand"
_IDLE_S = 300
"""A node that holds no worker for so long is given back; longer than Ray Train takes to form its group again."""


def render_stream(config: RunConfig, options: Options, files: Mapping[str, str], cloud: Cloud) -> list[Manifest]:
    """Return the documents, what others refer to first.

    Args:
        files: name -> text of the files that the head finds in /etc/solvent, `config.yaml` among them.

    Raises:
        ConfigError: this run cannot work there.
    """
    check_placement(config, options)
    name = get_job_name(config.run)
    sizes = plan_sizes(config, options)
    documents: list[Any] = [
        *_build_priority_classes(),
        _build_config_map(name, options, files),
        _build_network_policy(name, options),
        _build_disruption_budget(name, options),
        *([_build_monitor(name, options)] if options.monitor else []),
        _build_job(name, options, cloud, sizes, cluster_cpus=config.cluster.cpus_per_worker * sizes.workers_per_node),
    ]
    return cast(list[Manifest], documents)


def _build_job(name: str, options: Options, cloud: Cloud, sizes: Sizes, *, cluster_cpus: int) -> RayJob:
    labels: Labels = {RUN_LABEL: name}
    if options.queue:
        labels["kueue.x-k8s.io/queue-name"] = options.queue
    spec: RayJobSpec = {
        # A run that only fails again stops its own job (runtime/jobs/retries.py), and KubeRay does not try it again.
        "entrypoint": f"solvent train {CONFIG_FOLDER}/config.yaml {DRIVER_MARK}",
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": build_submitter(name, options, cloud),
        "backoffLimit": options.backoff_limit,
        "preRunningDeadlineSeconds": options.pre_running_deadline_s,
        "activeDeadlineSeconds": options.active_deadline_s,
        # No deletionRules: none of theirs applies to a job that was stopped. Kueue wants it this way, too.
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": options.keep_finished_s,
        "rayClusterSpec": _build_cluster(name, options, cloud, sizes, cluster_cpus),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": options.namespace, "labels": labels},
        "spec": spec,
    }


def _build_cluster(name: str, options: Options, cloud: Cloud, sizes: Sizes, cluster_cpus: int) -> RayCluster:
    is_autoscaling = not options.queue
    cluster: RayCluster = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": is_autoscaling,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "labels": {"ray.io/market-type": "on-demand"},
            # Nothing but the driver and the coordinator runs there: whoever asks for a CPU or a GPU goes to a worker.
            "rayStartParams": _get_start_params(cpus=0, gpus=0),
            "template": build_head(name, options, cloud, is_autoscaling=is_autoscaling),
        },
        "workerGroupSpecs": _build_groups(name, options, cloud, sizes, cluster_cpus),
    }
    if options.auth_secret:
        cluster["authOptions"]["secretName"] = options.auth_secret
    if is_autoscaling:
        autoscaler: AutoscalerOptions = {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": _IDLE_S,
            "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            "securityContext": get_container_security(),
            "args": [AUTOSCALER_COMMAND],
        }
        cluster["autoscalerOptions"] = autoscaler
    return cluster


def _build_groups(name: str, options: Options, cloud: Cloud, sizes: Sizes, cluster_cpus: int) -> list[WorkerGroup]:
    """Return the spot group and the one to fall back on; Ray's autoscaler tries the higher priority first."""
    spot_nodes = sizes.most_nodes if options.spot_nodes < 0 else options.spot_nodes
    # A pod that was given notice counts until it is gone; its replacement is only asked for if there is room beside it.
    # Nobody asks for more than the run's workers, so this rents no more of them.
    num_leaving = spot_nodes if options.spot_nodes < 0 and not options.queue else 0
    on_demand_nodes = sizes.least_nodes if options.on_demand_nodes < 0 else options.on_demand_nodes
    on_demand_nodes = 0 if options.queue else on_demand_nodes
    if spot_nodes + on_demand_nodes < sizes.least_nodes:
        raise ConfigError(
            f"--set spot_nodes={spot_nodes} and on_demand_nodes={on_demand_nodes} are fewer than the "
            f"{sizes.least_nodes} node(s) that cluster.min_workers needs, so training would never start. Raise "
            "spot_nodes, or lower cluster.min_workers."
        )

    def build(group: str, market: str, capacity: Capacity, most: int, priority: int) -> WorkerGroup:
        offer = "-".join(part for part in (cloud.name, market, options.gpu) if part)
        made: WorkerGroup = {
            "groupName": group,
            "replicas": most if options.queue else 0,
            "minReplicas": most if options.queue else 0,
            "maxReplicas": most,
            "labels": {"ray.io/market-type": market, "solvent-offer": offer},
            "rayStartParams": _get_start_params(
                cpus=cluster_cpus, gpus=options.gpus_per_node if sizes.uses_gpus else 0
            ),
            "template": build_worker(name, options, cloud, capacity, sizes),
        }
        if not options.queue:
            made["priority"] = priority
            made["idleTimeoutSeconds"] = _IDLE_S
        return made

    groups = [build(SPOT_GROUP, "spot", cloud.spot, spot_nodes + num_leaving, 10)]
    if on_demand_nodes:
        groups.append(build(ON_DEMAND_GROUP, "on-demand", cloud.on_demand, on_demand_nodes, 0))
    return groups


def _get_start_params(*, cpus: int, gpus: int) -> StartParams:
    return {"num-cpus": str(cpus), "num-gpus": str(gpus), "object-store-memory": str(OBJECT_STORE_BYTES)}


def _build_priority_classes() -> list[PriorityClass]:
    """Return the classes that all runs share: a head may take a worker's place, a worker takes nobody's."""

    def build(name: str, value: int, description: str, *, may_preempt: bool) -> PriorityClass:
        return {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": value,
            "preemptionPolicy": "PreemptLowerPriority" if may_preempt else "Never",
            "description": description,
        }

    return [
        build(HEAD_PRIORITY, 1_000_100, "Head of a training run: without it all its workers wait.", may_preempt=True),
        build(WORKER_PRIORITY, 1_000_000, "Worker of a training run: the run goes on without it.", may_preempt=False),
    ]


def _build_config_map(name: str, options: Options, files: Mapping[str, str]) -> ConfigMap:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "namespace": options.namespace, "labels": {RUN_LABEL: name}},
        "data": dict(sorted(files.items())),
    }


def _build_disruption_budget(name: str, options: Options) -> DisruptionBudget:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{name}-head", "namespace": options.namespace, "labels": {RUN_LABEL: name}},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {RUN_LABEL: name, ROLE_LABEL: "head"}}},
    }


def _build_network_policy(name: str, options: Options) -> NetworkPolicy:
    """Admit the run's own pods, KubeRay to the dashboard's port, and Prometheus if it was asked for.

    What goes out is not limited: object stores, W&B and the metadata server of the cloud have no fixed address.
    """
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    ingress: list[IngressRule] = [
        {"from": [{"podSelector": {"matchLabels": {RUN_LABEL: name}}}]},
        {
            "from": [{"podSelector": {"matchLabels": operator}, "namespaceSelector": {}}],
            "ports": [{"port": 8265, "protocol": "TCP"}],
        },
    ]
    if options.monitor:
        prometheus: Labels = {"kubernetes.io/metadata.name": options.monitor_namespace}
        ingress.append(
            {
                "from": [{"namespaceSelector": {"matchLabels": prometheus}}],
                "ports": [{"port": 8080, "protocol": "TCP"}],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{name}-network", "namespace": options.namespace, "labels": {RUN_LABEL: name}},
        "spec": {"podSelector": {"matchLabels": {RUN_LABEL: name}}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _build_monitor(name: str, options: Options) -> PodMonitor:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": f"{name}-metrics", "namespace": options.namespace, "labels": {RUN_LABEL: name}},
        "spec": {
            "selector": {
                "matchLabels": {RUN_LABEL: name},
                "matchExpressions": [{"key": ROLE_LABEL, "operator": "In", "values": ["head", "worker"]}],
            },
            "podMetricsEndpoints": [{"port": "metrics"}],
        },
    }
