"""What Ray's own autoscaler asks Kubernetes for once a node is under notice, and whether our group admits it."""

import pytest
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, NodeState, NodeStatus
from ray.core.generated.instance_manager_pb2 import Instance

from cluster.kube.options import Options
from cluster.kube.render import render
from elastic.config import ClusterConfig, DataConfig, RunConfig

WORKERS = 4
NODE = {"GPU": 1.0, "CPU": 1.0}


def render_spot_group():
    cluster = ClusterConfig(min_workers=2, max_workers=WORKERS, gpus_per_worker=1)
    config = RunConfig(run="r", storage="s3://b/runs", data=DataConfig(path="/mnt/solvent/data"), cluster=cluster)
    options = Options(image="registry.example.com/solvent:0.1.0", claim="data")
    return render(config, "generic", options)[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def build_node(number, *, is_draining):
    name, node_id = f"pod-{number}", bytes([number]) * 4
    status = Instance.RAY_STOPPING if is_draining else Instance.RAY_RUNNING
    ray_node = NodeState(
        node_id=node_id,
        instance_id=name,
        ray_node_type_name="spot",
        status=NodeStatus.DRAINING if is_draining else NodeStatus.RUNNING,
        total_resources=NODE,
    )
    instance = Instance(
        instance_id=name, instance_type="spot", status=status, cloud_instance_id=name, node_id=node_id.hex()
    )
    return AutoscalerInstance(ray_node=ray_node, im_instance=instance, cloud_instance_id=name)


@pytest.mark.parametrize("num_leaving", [0, 1, WORKERS])
def test_the_replacements_of_nodes_under_notice_are_asked_for_at_once_and_have_room(num_leaving):
    group = render_spot_group()
    wanted = ClusterResourceConstraint()  # Ray Train wants this many, whatever there is
    wanted.resource_requests.extend(ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(NODE)] * WORKERS))
    most = group["maxReplicas"]
    kind = NodeTypeConfig(name="spot", min_worker_nodes=0, max_worker_nodes=most, resources=NODE)
    request = SchedulingRequest(
        node_type_configs={"spot": kind},
        disable_launch_config_check=True,
        current_instances=[build_node(number, is_draining=number < num_leaving) for number in range(WORKERS)],
        cluster_resource_constraints=[wanted],
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    assert sum(launch.count for launch in reply.to_launch) == num_leaving
    # Ray's provider for KubeRay counts the leaving pods, too, and cuts the sum off at maxReplicas
    assert WORKERS + num_leaving <= most
