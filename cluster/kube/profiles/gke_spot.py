"""Google Kubernetes Engine with spot node pools.

Source: cloud.google.com/kubernetes-engine/docs/concepts/spot-vms (read 2026-11): the label and the taint; of the 30 s
that Compute Engine grants, pods that are not critical get 15.
"""

from collections.abc import Mapping

from cluster.kube.clouds import Capacity, Cloud
from cluster.kube.manifests import Manifest
from cluster.kube.options import Options
from cluster.kube.rayjob import render_stream
from elastic.config import RunConfig

CLOUD = Cloud(
    name="gke",
    grace_s=15,
    gpu_label="cloud.google.com/gke-accelerator",
    spot=Capacity(
        terms=(({"key": "cloud.google.com/gke-spot", "operator": "In", "values": ["true"]},),),
        tolerations=(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        ),
    ),
    on_demand=Capacity(terms=(({"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"},),)),
)


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the stream for GKE."""
    return render_stream(config, options, files, CLOUD)
