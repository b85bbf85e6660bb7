"""What `adapter.py` takes for granted of Ray: names and signatures first, then behaviour on a real cluster."""

import inspect
import math
import time
from types import SimpleNamespace

import pytest
import ray
from ray._private import state as ray_state
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.runtime.ray import adapter
from elastic.config import ClusterConfig
from elastic.errors import SolventError
from tests.ray._traces import wait_until


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_another_version_of_ray_is_refused(monkeypatch):
    adapter.check_version()
    monkeypatch.setattr(adapter, "CHECKED_VERSION", "2.59")
    with pytest.raises(SolventError, match=r"Install ray==2\.59\.\*"):
        adapter.check_version()


def test_the_hooks_of_the_scaling_policy_are_where_we_override_them():
    assert parameters(ElasticScalingPolicy.make_decision_for_non_running_worker_group) == ["self"]
    running = parameters(ElasticScalingPolicy.make_decision_for_running_worker_group)
    assert running == ["self", "worker_group_state", "worker_group_status"]
    assert parameters(ElasticScalingPolicy._get_reserved_resources) == ["self"]


@pytest.mark.parametrize("lost", [set(), {0}, {0, 1}])
def test_a_new_group_takes_no_room_on_nodes_that_are_known_to_be_lost_and_a_running_one_stays(
    connected, lost, monkeypatch
):
    gone = frozenset(connected.ids[index] for index in lost)
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1})
    policy = adapter.NodeAwarePolicy(scaling, world_sizes=tuple(range(1, 9)), find_lost=lambda: gone)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)  # to a client that a controller starts
    decision = policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == len(connected.ids) - len(gone)
    policy.make_decision_for_running_worker_group(SimpleNamespace(start_time=math.inf), None)
    assert policy._count_possible_workers(policy._get_reserved_resources()) == len(connected.ids)


def test_the_trainer_hands_its_controller_a_policy_and_callbacks():
    hook = inspect.signature(DataParallelTrainer._initialize_and_run_controller).parameters.values()
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in hook)
    call = inspect.getsource(DataParallelTrainer.fit).partition("self._initialize_and_run_controller(")[2]
    assert "scaling_policy=" in call
    assert "callbacks=" in call
    assert inspect.isclass(DatasetsCallback)
    assert inspect.isclass(PlacementGroupCleanerCallback)


@pytest.fixture(scope="module")
def connected(nodes):
    """This process as a driver of the cluster."""
    adapter.connect(nodes.address, ClusterConfig())
    yield nodes
    adapter.disconnect()


def test_worker_nodes_are_the_living_ones_with_room_for_a_worker(connected):
    found = adapter.get_worker_nodes(ClusterConfig())
    assert sorted(node.id for node in found) == sorted(connected.ids)  # not the head: it has no CPU
    assert {node.num_workers for node in found} == {1}
    assert adapter.get_worker_nodes(ClusterConfig(gpus_per_worker=1)) == []
    assert adapter.get_worker_nodes(ClusterConfig(cpus_per_worker=2)) == []


def test_a_coordinator_is_found_by_its_name_and_its_silence_is_an_error(connected):
    class Silent:
        def name(self) -> str:
            return "silent"

    assert adapter.get_coordinator("c") is None
    actor = adapter.create_coordinator("c", Silent)
    assert adapter.call(adapter.get_coordinator("c").name) == "silent"
    adapter.kill(actor)
    wait_until(lambda: is_silent(actor), timeout_s=10, what="it ends")  # Ray does not wait for that


def is_silent(actor) -> bool:
    try:
        adapter.call(actor.name)
    except SolventError as error:
        return "does not answer" in str(error)
    return False


def test_a_task_on_a_node_is_over_once_it_has_returned_or_failed_or_its_node_is_not_there(connected, tmp_path):
    def write_where_and_wait(folder) -> None:
        (folder / "where").write_text(ray.get_runtime_context().get_node_id())
        while not (folder / "go").exists():
            time.sleep(0.05)
        raise SolventError("it fails")

    node = connected.ids[1]
    task = adapter.NodeTask(node, write_where_and_wait, tmp_path)
    wait_until((tmp_path / "where").exists, timeout_s=60, what="it runs")
    assert (tmp_path / "where").read_text() == node
    assert not task.is_over()
    (tmp_path / "go").touch()
    wait_until(task.is_over, timeout_s=30, what="it is over")
    nowhere = adapter.NodeTask("1" * len(node), write_where_and_wait, tmp_path)
    wait_until(nowhere.is_over, timeout_s=30, what="it cannot run")


@pytest.mark.parametrize("spell", [lambda node: "", lambda node: "f" * len(node), bytes.fromhex, str.upper])
def test_a_node_that_is_not_there_is_not_drained(connected, spell):
    with pytest.raises(SolventError, match="is not in the cluster"):
        adapter.drain_node(spell(connected.ids[0]), reason="spot", deadline_s=time.time() + 30)
    assert adapter.get_draining_nodes() == {}


def test_a_draining_node_is_known_with_its_deadline_in_seconds_and_stays_for_who_works_there(connected):
    node = connected.ids[-1]

    @ray.remote(num_cpus=1)
    class Busy:
        def where(self) -> str:
            return ray.get_runtime_context().get_node_id()

    pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    busy = Busy.options(scheduling_strategy=pin).remote()
    assert ray.get(busy.where.remote()) == node

    deadline_s = time.time() + 30
    adapter.drain_node(node, reason="spot", deadline_s=deadline_s)

    assert adapter.get_draining_nodes() == {node: pytest.approx(deadline_s, abs=0.002)}
    assert set(ray_state.state.get_draining_nodes()) == {node}
    time.sleep(2)
    assert ray.get(busy.where.remote()) == node
    assert node in {n.id for n in adapter.get_worker_nodes(ClusterConfig())}
    ray.kill(busy)
