"""Any Kubernetes: nodes that may vanish carry a label of ours, all others count as on demand.

    kubectl label node NODE solvent.dev/capacity=spot

Without such nodes the on-demand group trains. The grace period is the default of Kubernetes.
"""

from collections.abc import Mapping

from cluster.kube.clouds import Capacity, Cloud
from cluster.kube.manifests import Manifest
from cluster.kube.options import Options
from cluster.kube.rayjob import render_stream
from elastic.config import RunConfig

_CAPACITY = "solvent.dev/capacity"
CLOUD = Cloud(
    name="kubernetes",
    grace_s=30,
    gpu_label="nvidia.com/gpu.product",
    spot=Capacity(
        terms=(({"key": _CAPACITY, "operator": "In", "values": ["spot"]},),),
        tolerations=({"key": _CAPACITY, "operator": "Equal", "value": "spot", "effect": "NoSchedule"},),
    ),
    on_demand=Capacity(terms=(({"key": _CAPACITY, "operator": "NotIn", "values": ["spot"]},),)),
)


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the stream for any Kubernetes."""
    return render_stream(config, options, files, CLOUD)
