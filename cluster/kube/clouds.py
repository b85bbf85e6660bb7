"""What differs between the Kubernetes of one cloud and another: data that a profile fills in."""

from dataclasses import dataclass, field

from cluster.kube.manifests import Expression, Labels, NodeAffinity, NodeTerm, Toleration


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How a pod gets onto nodes of one kind (spot or on demand)."""

    terms: tuple[tuple[Expression, ...], ...]
    """A node fits if it meets all conditions of one of these."""
    tolerations: tuple[Toleration, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """One cloud's Kubernetes."""

    name: str
    """Short, for offers: `gke`."""
    grace_s: int
    """What a pod gets between SIGTERM and SIGKILL when its spot node is taken back."""
    gpu_label: str
    """The node label that names the GPU model."""
    spot: Capacity
    on_demand: Capacity
    identity_labels: Labels = field(default_factory=dict[str, str])
    """Pod labels that the cloud's identity needs beside a service account."""


def require_nodes(capacity: Capacity) -> NodeAffinity:
    """Return the affinity that admits this capacity only."""
    terms: list[NodeTerm] = [{"matchExpressions": list(term)} for term in capacity.terms]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
