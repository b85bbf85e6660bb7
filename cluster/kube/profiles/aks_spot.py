"""Azure Kubernetes Service with spot node pools.

Source: learn.microsoft.com/azure/aks/spot-node-pool (read 2026-11): the label and the taint. Azure gives notice at
least 30 s ahead; finding it takes its part, so a pod is given 25.
"""

from collections.abc import Mapping

from cluster.kube.clouds import Capacity, Cloud
from cluster.kube.manifests import Manifest
from cluster.kube.options import Options
from cluster.kube.rayjob import render_stream
from elastic.config import RunConfig

_PRIORITY = "kubernetes.azure.com/scalesetpriority"
CLOUD = Cloud(
    name="aks",
    grace_s=25,
    gpu_label="node.kubernetes.io/instance-type",
    spot=Capacity(
        terms=(({"key": _PRIORITY, "operator": "In", "values": ["spot"]},),),
        tolerations=({"key": _PRIORITY, "operator": "Equal", "value": "spot", "effect": "NoSchedule"},),
    ),
    on_demand=Capacity(terms=(({"key": _PRIORITY, "operator": "DoesNotExist"},),)),
    identity_labels={"azure.workload.identity/use": "true"},
)


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the stream for AKS."""
    return render_stream(config, options, files, CLOUD)
