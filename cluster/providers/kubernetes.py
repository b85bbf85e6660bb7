"""Kubernetes: the pod's end (SIGTERM, then its grace period) and, if the pod may read its node, the node's taints.

Source: kubernetes.io/docs/concepts: workloads/pods/pod-lifecycle (termination) and
scheduling-eviction/taint-and-toleration (2026-11-24). The grace period is, in this order: `fault.term_grace_s`;
SOLVENT_GRACE_S in the environment, which a pod's template can set beside its `terminationGracePeriodSeconds` (the
downward API does not offer that field); the pod's own specification, if its service account may get pods; 30 s, the
default of Kubernetes. A pod that is being deleted says so in its `deletionTimestamp`, which is its true deadline and
comes without a signal. To read the node's taints and labels the pod needs NODE_NAME (fieldRef spec.nodeName) and the
right to get nodes (`--set node_notices=true`). `SOLVENT_KUBERNETES_URL` moves the API server.
"""

from collections.abc import Sequence
from typing import Any, cast

from cluster.providers._base import Evidence, Feed, Machine, NodeNotice, Response, get_excerpt, parse_object, parse_time
from cluster.providers._sigterm import open_sigterm_feed
from elastic.errors import NoticeError

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
DEFAULT_GRACE_S = 30.0
_EVERY_S = 2.0
"""Every node asks one API server."""
_LEAVING_TAINTS = {
    "node.kubernetes.io/out-of-service": "the node is out of service",
    "cloud.google.com/impending-node-termination": "GKE ends the node",
    "aws-node-termination-handler/spot-itn": "spot interruption of the node",
    "aws-node-termination-handler/scheduled-maintenance": "maintenance of the node",
    "aws-node-termination-handler/asg-lifecycle-termination": "the node's group ends it",
    "karpenter.sh/disrupted": "Karpenter ends the node",
    "karpenter.sh/disruption": "Karpenter ends the node",
    "ToBeDeletedByClusterAutoscaler": "the cluster autoscaler ends the node",
}
"""Taints that say that the node goes. Each gives the pod its grace period, at the least."""
_LEAVING_LABELS = {
    "qos.coreweave.cloud/pending-preemption": "CoreWeave takes the node",
}
"""The same as labels. CoreWeave sets its own to "true" up to seven minutes before it drains the node; the least is not
said. Source: docs.coreweave.com, platform/capacity-plans/spot-node-pools and
products/sunk/deploy_sunk/use-spot-capacity (2026-11-30)."""
_ADVICE_TAINTS = {
    "node.kubernetes.io/unschedulable": "the node is cordoned",
    "aws-node-termination-handler/rebalance-recommendation": "rebalance recommendation",
    "DeletionCandidateOfClusterAutoscaler": "the cluster autoscaler may end the node",
}


def detect(machine: Machine) -> Evidence:
    """Look for what the kubelet gives every container."""
    host = machine.env.get("KUBERNETES_SERVICE_HOST")
    if host:
        return Evidence(is_here=True, why=f"KUBERNETES_SERVICE_HOST={host}")
    return Evidence(is_here=False, why="KUBERNETES_SERVICE_HOST is not set")


def open_feeds(machine: Machine) -> list[Feed]:
    """Read the signal, and the pod and its node as far as there is a service account."""
    api = _Api(machine)
    grace_s = machine.grace_s or _parse_grace(machine.env.get("SOLVENT_GRACE_S", ""))
    feeds = [open_sigterm_feed(machine, get_grace_s=lambda: grace_s or api.pod_grace_s or DEFAULT_GRACE_S)]
    if api.is_usable and api.pod:
        feeds.append(Feed(name="pod", every_s=_EVERY_S, read=api.read_pod, url=api.pod_url))
    if api.is_usable and (node := machine.env.get("NODE_NAME")):
        url = f"{api.base}/api/v1/nodes/{node}"

        def read_node() -> Sequence[NodeNotice]:
            return parse_node(api.get(url), grace_s=grace_s or api.pod_grace_s or DEFAULT_GRACE_S)

        feeds.append(Feed(name="node taints and labels", every_s=_EVERY_S, read=read_node, url=url))
    return feeds


def parse_pod(response: Response) -> tuple[float | None, Sequence[NodeNotice]]:
    """Read a pod: its grace period in seconds, and the notice that it is being deleted.

    Raises:
        NoticeError: the answer is no pod.
    """
    pod = _parse_kind(response, "Pod")
    spec, metadata = pod.get("spec"), pod["metadata"]
    grace = spec.get("terminationGracePeriodSeconds") if isinstance(spec, dict) else None
    grace_s = float(grace) if isinstance(grace, int) and grace >= 0 else None
    if (deleted := metadata.get("deletionTimestamp")) is None:
        return grace_s, []
    # The API server sets it to the end of the grace period, not to its start.
    deadline_s = response.to_our_time(parse_time(deleted, what="the pod's deletionTimestamp"))
    return grace_s, [NodeNotice(id="deletion", reason="the pod is being deleted", deadline_s=deadline_s)]


def parse_node(response: Response, *, grace_s: float) -> Sequence[NodeNotice]:
    """Read the taints and the labels of a node.

    Args:
        grace_s: what the pod gets once it is evicted; neither carries a time to go by.

    Raises:
        NoticeError: the answer is no node.
    """
    node = _parse_kind(response, "Node")
    labels: Any = node["metadata"].get("labels")
    leave = [
        NodeNotice(id=key, reason=f"{reason} (label {key})", lead_s=grace_s)
        for key, reason in _LEAVING_LABELS.items()
        if isinstance(labels, dict) and cast(dict[str, Any], labels).get(key) == "true"
    ]
    spec: Any = node.get("spec")
    taints: Any = spec.get("taints") if isinstance(spec, dict) else None
    if taints is None:
        return leave
    if not isinstance(taints, list) or not all(isinstance(taint, dict) for taint in taints):
        raise NoticeError(f"the node was answered with {get_excerpt(response)}: its taints are no list of objects.")
    keys = [key for taint in cast(list[dict[str, Any]], taints) if isinstance(key := taint.get("key"), str)]
    leave += [
        NodeNotice(id=key, reason=f"{_LEAVING_TAINTS[key]} (taint {key})", lead_s=grace_s)
        for key in keys
        if key in _LEAVING_TAINTS
    ]
    advice = [
        NodeNotice(id=key, reason=f"{_ADVICE_TAINTS[key]} (taint {key})", kind="advice")
        for key in keys
        if key in _ADVICE_TAINTS
    ]
    return leave + advice


def _parse_kind(response: Response, kind: str) -> dict[str, Any]:
    fields = parse_object(response, what=f"the API server, asked for a {kind},")
    if fields.get("kind") != kind or not isinstance(fields.get("metadata"), dict):
        raise NoticeError(f"the API server answered {get_excerpt(response)}, which is no {kind}.")
    return fields


def _parse_grace(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


class _Api:
    """The API server, as the pod's service account may use it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        env = machine.env
        host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
        host = f"[{host}]" if ":" in host else host
        self.base = env.get("SOLVENT_KUBERNETES_URL", f"https://{host}:{port}").rstrip("/")
        self.pod = env.get("POD_NAME") or env.get("HOSTNAME", "")
        namespace = env.get("POD_NAMESPACE") or machine.read(f"{_ACCOUNT}/namespace")
        self.pod_url = f"{self.base}/api/v1/namespaces/{namespace}/pods/{self.pod}"
        self.is_usable = bool(namespace and self._read_token())
        self.pod_grace_s: float | None = None

    def get(self, url: str) -> Response:
        """Ask as the service account; its token is read anew, because the kubelet renews it."""
        response = self._machine.fetch(
            url,
            headers={"Authorization": f"Bearer {self._read_token()}", "Accept": "application/json"},
            timeout_s=5.0,
            ca_file=str(self._machine.root / f"{_ACCOUNT}/ca.crt".lstrip("/")),
        )
        if response.status in (401, 403):
            raise NoticeError(
                f"the pod's service account may not get {url} (HTTP {response.status}). Bind it to a role with the "
                "verb get on pods and nodes, or rely on SIGTERM and fault.term_grace_s."
            )
        return response

    def read_pod(self) -> Sequence[NodeNotice]:
        """Read the pod, and keep its grace period for the other feeds."""
        self.pod_grace_s, notices = parse_pod(self.get(self.pod_url))
        return notices

    def _read_token(self) -> str:
        return self._machine.read(f"{_ACCOUNT}/token")
