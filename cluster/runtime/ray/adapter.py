"""Every private Ray API that Solvent uses, and the public one beside it: the one file to read when Ray changes.

Checked against ray 2.60 (`check_version` refuses others; tests/ray/test_adapter.py is the contract).
"""

import asyncio
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray._private import services
from ray._private import state as ray_state
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from ray._private.ray_logging import stdout_deduplicator
from ray._private.worker import get_dashboard_url
from ray._raylet import Config as RayConfig  # pyright: ignore[reportAttributeAccessIssue] # compiled
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, RpcError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.providers import RAY_DEFAULT_S, RAY_SETTING, SelfDrain
from cluster.runtime.ray.ray_token import MODE, explain_refusal, make_first_token, read_token
from elastic.config import ClusterConfig
from elastic.config import RunConfig as SolventConfig
from elastic.errors import NoticeError, SolventError
from elastic.storage import is_url

CHECKED_VERSION = "2.60"
NAMESPACE = "solvent"
_CALL_TIMEOUT_S = 30.0
_ADMITTED_S = 5.0
_TRAIN_SETTINGS = {
    # A placement group of the old size waits this long for a node that died unseen by us too (60 s by default).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Our own watches tell the coordinator; Ray's, a process per worker group, would tell the agents.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Agents need no working directory of their own, and hosts take over theirs.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

_SELF_DRAIN_MESSAGE = "Node received SIGTERM; draining before shutdown."
_SELF_DRAIN = re.compile(rb"Drain raylet RPC has received\. Deadline is (\d+)\..*message: Node received SIGTERM")

_DYING_WORDS = re.compile("Raylet is terminated|The node with node id: .* has been marked dead")
"""What Ray would print on the driver, page by page, for every node that is lost; we say that ourselves."""


class ActorGoneError(SolventError):
    """The actor that was called has died, or cannot be reached at the moment."""


def check_version() -> None:
    """Refuse a Ray whose internals were not checked.

    Raises:
        SolventError: another version than 2.60.
    """
    if not ray.__version__.startswith(CHECKED_VERSION + "."):
        raise SolventError(
            f"ray {ray.__version__} is installed, but Solvent leans on internals of ray {CHECKED_VERSION} (its scaling "
            f"policy and drain states). Install ray=={CHECKED_VERSION}.*."
        )


# ---- the cluster


@dataclass(frozen=True, kw_only=True)
class WorkerNode:
    """A live node that can hold workers."""

    id: str
    num_workers: int
    offer: str
    """The node's `solvent-offer` label: what was rented; empty if unknown."""
    zone: str = ""
    """Ray's own label; empty if unknown, like the next."""
    capacity: str = ""
    """Spot or on-demand."""


def connect(address: str | None, cluster: ClusterConfig) -> None:
    """Connect to the cluster at the address, or start one of a single node on this machine."""
    check_version()
    os.environ.update({name: value for name, value in _TRAIN_SETTINGS.items() if name not in os.environ})
    # What people should see comes through the coordinator; Ray would forward its own daemons' dying words as well.
    options: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": "WARNING", "log_to_driver": False}
    stdout_deduplicator.skip_re = _DYING_WORDS
    if address:
        show_token(address)
        ray.init(address=address, **options)
        return
    make_first_token(os.environ)
    num_cpus = max(os.cpu_count() or 1, cluster.max_workers * cluster.cpus_per_worker + 1)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)


def show_token(address: str) -> None:
    """Have this process show its token to the cluster at HOST:PORT, if that lets nobody in without one.

    By default Ray shows none there. Where none is wanted it must not: a driver that shows one wants one from the
    workers that call it back. Ray itself finds out after 20 s that it is refused, and tells why in its log. An address
    where nobody answers in time is left to it.

    Raises:
        ConfigError: there is no token here, or the cluster has another.
    """
    import grpc  # noqa: PLC0415 (a fifth of a second that agents and coordinator do not need, like the next)
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc  # noqa: PLC0415

    if "://" in address or ":" not in address:
        return
    is_set, token = MODE in os.environ, read_token(os.environ)
    if is_set and os.environ[MODE].lower() == "token" and not token:
        raise explain_refusal(address, os.environ)  # Ray aborts the process

    def is_refused(metadata: list[tuple[str, str]]) -> bool:
        request: Any = gcs_service_pb2.CheckAliveRequest()  # pyright: ignore[reportAttributeAccessIssue] # generated
        with grpc.insecure_channel(address) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            try:
                stub.CheckAlive(request, timeout=_ADMITTED_S, metadata=metadata)
            except grpc.RpcError as error:
                return isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED
        return False

    if not is_refused([]):
        return
    if not token or is_refused([("authorization", f"Bearer {token}")]):
        raise explain_refusal(address, os.environ)
    if not is_set:
        os.environ[MODE] = "token"
        RayConfig.initialize("")  # it has read the environment when it was imported


def find_own_cluster() -> str | None:
    """Return the address of the Ray cluster that runs on this machine, as RAY_ADDRESS=auto means it, if any."""
    try:
        return services.get_ray_address_from_environment("auto", None)
    except ConnectionError:  # there is none
        return None


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    ray.shutdown()


def get_own_ip() -> str:
    """Return the address under which the other nodes reach this one."""
    return cast(str, ray.util.get_node_ip_address())


def get_worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Return what one worker needs of a node, in Ray's resource names."""
    need = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        need["GPU"] = float(cluster.gpus_per_worker)
    return need


def get_worker_nodes(cluster: ClusterConfig) -> list[WorkerNode]:
    """Return the live nodes with room for at least one worker, from Ray's node table (no stale reservation)."""
    need = get_worker_resources(cluster)
    most = math.inf if cluster.gpus_per_worker else cluster.max_workers  # spare cores are not rented, spare GPUs are
    nodes = [
        WorkerNode(
            id=node["NodeID"],
            num_workers=int(min(most, *(node["Resources"].get(name, 0.0) // amount for name, amount in need.items()))),
            offer=labels.get("solvent-offer", ""),
            zone=labels.get("ray.io/availability-zone", ""),
            capacity=labels.get("ray.io/market-type", ""),
        )
        for node in ray.nodes()
        if node["Alive"]
        for labels in [node.get("Labels", {})]
    ]
    return [node for node in nodes if node.num_workers]


def get_draining_nodes() -> dict[str, float | None]:
    """Return the nodes that Ray is draining and the Unix time at which each is gone, if that is known."""
    draining = ray_state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 if deadline_ms else None for node, deadline_ms in draining.items()}


def drain_node(node: str, *, reason: str, deadline_s: float | None) -> None:
    """Ask Ray to place nothing more on a node that goes away at `deadline_s` (Unix time; None: nobody knows when).

    Any process on the cluster may ask, and ask again with another deadline: the last one counts. It cannot be undone.

    Raises:
        SolventError: there is no such node (Ray would accept that, and do nothing), or Ray refused or did not answer.
    """
    alive = [row["NodeID"] for row in ray.nodes() if row["Alive"]]
    if node not in alive:
        raise SolventError(f"node {node!r} is not in the cluster, so it cannot drain. Name one of: {', '.join(alive)}.")
    # Private and untyped; only node watches and the fault injector need them.
    from ray._raylet import GcsClient  # noqa: PLC0415 # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

    address = ray.get_runtime_context().gcs_address
    preemption = autoscaler_pb2.DrainNodeReason.Value(  # pyright: ignore[reportAttributeAccessIssue]
        "DRAIN_NODE_REASON_PREEMPTION"
    )
    deadline_ms = 0 if deadline_s is None else int(deadline_s * 1000)
    try:
        accepted, why_not = GcsClient(address=address).drain_node(node, preemption, reason, deadline_ms)
    except RpcError as error:
        raise SolventError(f"Ray's head does not answer a request to drain node {node}: {error}") from error
    if not accepted:
        raise SolventError(f"Ray refused to drain node {node}: {why_not}")


def drain_as_on_sigterm(node: str) -> None:
    """Do to a node what its `ray start --block` does on SIGTERM: announce its end, whatever time is really left."""
    drain_node(node, reason=_SELF_DRAIN_MESSAGE, deadline_s=time.time() + RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S)


class SelfDrainLog:
    """Finds in the log of this node's raylet that Ray was told to end (SIGTERM) and drains its own node.

    Ray publishes the deadline of a drain but not its reason. The raylet logs both, in one line.
    """

    def __init__(self) -> None:
        self._raylet_pid = get_raylet_pid()
        self._position = 0
        self._found: SelfDrain | None = None
        self._lock = threading.Lock()

    def read(self) -> SelfDrain | None:
        """Return Ray's drain of its own node, once there is one. Several threads may ask.

        Raises:
            NoticeError: the raylet writes no log file.
        """
        with self._lock:
            return self._read()

    def _read(self) -> SelfDrain | None:
        log = Path(f"/proc/{self._raylet_pid}/fd/1")
        if self._found or not log.exists():
            return self._found
        if not log.is_file():
            raise NoticeError(
                "the raylet writes no log file, so a SIGTERM cannot be told from other drains, and Ray's own deadline "
                f"counts. Start Ray without RAY_LOG_TO_STDERR, or set {RAY_SETTING} to the machine's grace."
            )
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._position = 0 if size < self._position else self._position  # Ray began a new file
            file.seek(self._position)
            data = file.read()
        self._position += data.rfind(b"\n") + 1
        for match in _SELF_DRAIN.finditer(data):
            lead_s = float(os.environ.get(RAY_SETTING) or RAY_DEFAULT_S)
            self._found = SelfDrain(started_s=int(match[1]) / 1000 - lead_s, lead_s=lead_s)
        return self._found


class NodeTask:
    """A function that runs once on a node, without taking any of its resources."""

    def __init__(self, node: str, function: Callable[..., Any], *args: object) -> None:
        pin = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": pin}
        self._result: Any = ray.remote(function).options(**options).remote(*args)

    def is_over(self) -> bool:
        """Whether it has returned, failed, or can never run as its node is gone."""
        return bool(ray.wait([self._result], timeout=0)[0])

    def get_failure(self) -> str:
        """Return what it has failed of; empty if it has not, or goes on."""
        if not self.is_over():
            return ""
        try:
            ray.get(self._result)
        except RayTaskError as error:
            return str(error.cause)
        except RayError as error:  # its node or its process is gone
            return type(error).__name__
        return ""


def create_on_node(node: str, cls: type, kwargs: dict[str, Any]) -> Any:
    """Create an actor on a node without taking any of its resources; it ends with the process that created it."""
    pin = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": pin}
    actor: Any = ray.remote(cls)
    return actor.options(**options).remote(**kwargs)


def get_raylet_pid() -> int:
    """Return the process id of the raylet that this worker belongs to."""
    return int(os.environ["RAY_RAYLET_PID"])


def get_own_actor() -> Any:
    """Return the handle of the actor that calls this, for others."""
    return ray.get_runtime_context().current_actor


# ---- the coordinator's actor


def create_coordinator(name: str, cls: type, **kwargs: object) -> Any:
    """Create the detached actor on the node that this process runs on; its methods run in threads."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(cls)
    # of two drivers that start at one time one creates it, and both meet there
    options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 16, "lifetime": "detached", "get_if_exists": True}
    return actor.options(name=name, scheduling_strategy=here, **options).remote(**kwargs)


def get_coordinator(name: str) -> Any | None:
    """Return the named actor, or None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def call(method: Any, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
    """Call an actor's method and return its result.

    Raises:
        ActorGoneError: the actor has died.
        SolventError: it does not answer.
    """
    try:
        return ray.get(method.remote(*args), timeout=timeout_s)
    except RayActorError as error:
        raise ActorGoneError(f"the coordinator does not answer: {error}") from error
    except GetTimeoutError as error:
        raise SolventError(
            f"the coordinator has not answered for {timeout_s:g} s. Look at the load and the memory of its machine "
            "(the head), then start the same command again: it finds the run at work, or resumes it."
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, SolventError):
            raise error.cause from None
        raise


def post(method: Any, *args: object) -> None:
    """Call an actor's method without waiting for its result."""
    method.remote(*args)


def kill(actor: Any) -> None:
    """End an actor at once."""
    ray.kill(actor)


# ---- the Ray job that this process is the entrypoint of


def stop_own_job(message: str) -> None:
    """Mark the Ray job that started this process as stopped, with a message; whatever the exit code, it stays so.

    Ray offers to stop a job, but not to say why; nor does it let an entrypoint choose what its exit means. Its own
    supervisor, which writes down the end of a process, leaves a job that has ended as it is.

    Raises:
        SolventError: this process is no job's entrypoint, or the head does not answer.
    """
    job: Any = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission = cast(dict[str, Any], job.get("metadata") or {}).get("job_submission_id")
    address = os.environ.get("RAY_ADDRESS")
    if not submission or not address:
        raise SolventError(
            "this process is not the entrypoint of a Ray job, so there is none to stop. Leave --stop-retries out."
        )
    from ray._raylet import GcsClient  # noqa: PLC0415 # pyright: ignore[reportAttributeAccessIssue]
    from ray.dashboard.modules.job.common import JobInfoStorageClient, JobStatus  # noqa: PLC0415 (untyped)

    async def stop() -> None:
        jobs: Any = JobInfoStorageClient(GcsClient(address=address))
        await jobs.put_status(submission, JobStatus.STOPPED, message=message)

    try:
        asyncio.run(stop())
    except (RpcError, RuntimeError, TimeoutError) as error:
        raise SolventError(f"the Ray job {submission} cannot be stopped for good: {error}") from error


# ---- Ray Train


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where an agent finds itself."""

    node: str
    gpus: str
    """Its CUDA_VISIBLE_DEVICES; empty without GPUs."""
    group_key: str
    """The same for all workers of one group, another for each group."""
    group_size: int


def get_worker_place() -> WorkerPlace:
    """Return the place of the Ray Train worker that calls this."""
    group = ray.util.get_current_placement_group()
    assert group is not None  # Ray Train puts every worker group into one
    gpu_ids = ray.get_gpu_ids()
    return WorkerPlace(
        node=ray.get_runtime_context().get_node_id(),
        gpus=",".join(str(gpu) for gpu in gpu_ids),
        group_key=group.id.hex(),
        group_size=ray.train.get_context().get_world_size(),
    )


class NodeAwarePolicy(ElasticScalingPolicy):
    """Counts workers on nodes that live, at the moment of the decision.

    Ray's own reads a reservation table that is refreshed every 20 s; a node that just died is still in it, and the
    next worker group waits a minute for room on it. A new group takes no room on nodes that drain, nor on those whose
    loss is known here seconds before Ray sees it. A running group stays on a draining node until the node is gone:
    a raylet that drains ends as soon as nothing runs on it, and with it would end the trainers that are still saving.
    """

    def __init__(
        self, scaling_config: ScalingConfig, *, world_sizes: tuple[int, ...], find_lost: Callable[[], Set[str]]
    ) -> None:
        super().__init__(scaling_config)
        self._world_sizes = world_sizes
        self._find_lost = find_lost
        self._left_out: frozenset[str] = frozenset()

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Place a new group on nodes that neither drain nor are known to be lost."""
        self._left_out = frozenset(get_draining_nodes()) | self._find_lost()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, *args: Any, **kwargs: Any) -> Any:
        """Grow onto new nodes; stay on draining ones."""
        self._left_out = frozenset()
        return super().make_decision_for_running_worker_group(*args, **kwargs)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Count none where no world is possible; workers beyond the largest possible world stay, as its spares."""
        num_workers = super()._count_possible_workers(reserved_resources)
        return num_workers if num_workers >= self._world_sizes[0] else 0

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return {
            node["NodeID"]: node["Resources"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in self._left_out
        }


class _AgentTrainer(DataParallelTrainer):
    def __init__(
        self, *args: Any, world_sizes: tuple[int, ...], find_lost: Callable[[], Set[str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._policy = partial(NodeAwarePolicy, world_sizes=world_sizes, find_lost=find_lost)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = self._policy(self.scaling_config)
        unused: tuple[type, ...] = (DatasetsCallback,)  # a process per worker group, for datasets that there are not
        if not get_dashboard_url():  # it asks the dashboard twice a second, and says so each time there is none
            unused = (*unused, PlacementGroupCleanerCallback)
        parts["callbacks"] = [callback for callback in parts["callbacks"] if not isinstance(callback, unused)]
        return super()._initialize_and_run_controller(**parts)


def run_agents(
    agent: Callable[[dict[str, Any]], None],
    fields: dict[str, Any],
    config: SolventConfig,
    *,
    find_lost: Callable[[], Set[str]],
) -> None:
    """Have Ray Train hold between min and max workers, each running the agent, until all of them return.

    Args:
        find_lost: names the nodes that are known to be lost though Ray still counts them; called in Ray's controller.
    """
    cluster = config.cluster
    is_elastic = cluster.min_workers != cluster.max_workers
    with _open_ray_folder(config.storage) as storage_path:
        trainer = _AgentTrainer(
            agent,
            world_sizes=config.get_world_sizes(),
            find_lost=find_lost,
            train_loop_config=fields,
            scaling_config=ScalingConfig(
                num_workers=(cluster.min_workers, cluster.max_workers) if is_elastic else cluster.max_workers,
                use_gpu=bool(cluster.gpus_per_worker),
                resources_per_worker=get_worker_resources(cluster),
                elastic_resize_monitor_interval_s=1.0,
            ),
            # What Ray counts as failures are changes of the cluster; our own budget is the coordinator's.
            run_config=RunConfig(
                name=f"{config.run}-{int(time.time() * 1000)}",
                storage_path=storage_path,
                failure_config=FailureConfig(max_failures=-1),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        trainer.fit()


@contextmanager
def _open_ray_folder(storage: str) -> Generator[str]:
    """Yield where Ray Train keeps its state: agents report nothing to it, so it need not stay, or be seen by others."""
    if not is_url(storage):
        yield f"{storage}/.ray-train"
        return
    with tempfile.TemporaryDirectory(prefix="solvent-ray-train-") as folder:
        yield folder


class AgentRun:
    """`run_agents` in a thread, beside the driver's loop."""

    def __init__(
        self,
        agent: Callable[[dict[str, Any]], None],
        fields: dict[str, Any],
        config: SolventConfig,
        *,
        find_lost: Callable[[], Set[str]],
    ) -> None:
        self.error: BaseException | None = None
        """What Ray Train raised, once it is over."""
        body = partial(run_agents, agent, fields, config, find_lost=find_lost)
        self._thread = threading.Thread(target=self._run, args=(body,), name="ray-train", daemon=True)
        self._thread.start()

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            self.error = error

    @property
    def is_over(self) -> bool:
        """Whether Ray Train has returned."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False if it took longer."""
        self._thread.join(timeout_s)
        return self.is_over
