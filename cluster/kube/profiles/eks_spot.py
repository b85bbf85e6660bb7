"""Amazon EKS with spot capacity, from managed node groups or Karpenter.

Source: docs.aws.amazon.com/eks/latest/userguide/managed-node-groups.html and karpenter.sh/docs/concepts/scheduling
(read 2026-11): the labels. EC2 gives notice 120 s ahead; Karpenter or the node termination handler makes it a drain.
"""

from collections.abc import Mapping

from cluster.kube.clouds import Capacity, Cloud
from cluster.kube.manifests import Manifest
from cluster.kube.options import Options
from cluster.kube.rayjob import render_stream
from elastic.config import RunConfig

CLOUD = Cloud(
    name="eks",
    grace_s=120,
    gpu_label="node.kubernetes.io/instance-type",
    spot=Capacity(
        terms=(
            ({"key": "eks.amazonaws.com/capacityType", "operator": "In", "values": ["SPOT"]},),
            ({"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]},),
        ),
    ),
    on_demand=Capacity(
        terms=(
            ({"key": "eks.amazonaws.com/capacityType", "operator": "In", "values": ["ON_DEMAND"]},),
            ({"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["on-demand"]},),
        ),
    ),
)


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the stream for EKS."""
    return render_stream(config, options, files, CLOUD)
