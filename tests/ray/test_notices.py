"""Watches on a real cluster: what a provider's server says reaches Ray's drain with the true deadline."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from cluster.runtime.coordinator.nodes.node_watches import WatchActor
from cluster.runtime.ray import adapter
from elastic.config import ClusterConfig
from elastic.records.rundir import parse_utc, read_rows
from tests.contract._clouds import Aws, Azure, Gcp
from tests.ray._nodes import Nodes, get_env
from tests.ray._runs import Run
from tests.ray._traces import assert_nothing_left, find_processes, wait_until

LEAN = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
TOKEN = "not-a-secret"


@pytest.fixture(scope="module")
def clouds():
    servers = {"aws": Aws(), "gcp": Gcp(), "azure": Azure("trainers_1", "trainers_2")}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def hook_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def env(clouds, hook_port):
    """What tells the watches where the servers are; the nodes have it from their start."""
    env = {"SOLVENT_NOTICE_HOOK": f"{hook_port}:{TOKEN}", "SOLVENT_GRACE_S": "15"}
    for server in clouds.values():
        env |= server.get_env()
    return env


@pytest.fixture(scope="module")
def cluster(env):
    """Two nodes, and this process as their driver."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    nodes = Nodes(folder, num_nodes=2, env=env)
    try:
        adapter.connect(nodes.address, ClusterConfig())
        yield nodes
        adapter.disconnect()
    finally:
        nodes.close()
        assert_nothing_left(folder)
        shutil.rmtree(folder)


@ray.remote(num_cpus=0, max_concurrency=8)
class Listener:
    """Takes news in the coordinator's place."""

    def __init__(self) -> None:
        self.news = []

    def hear_watch(self, node, news):
        self.news.append((node, news))

    def get_news(self):
        return self.news


@pytest.fixture(scope="module")
def listener(cluster):
    head = next(n["NodeID"] for n in ray.nodes() if n["NodeID"] not in cluster.ids)
    pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(head, soft=False)
    return Listener.options(scheduling_strategy=pin).remote()


def start_watch(node, notices, listener):
    fields = {"coordinator": listener, "node": node, "notices": notices, "grace_s": 0.0, "leave_before_s": 600.0}
    actor = adapter.create_on_node(node, WatchActor, fields)
    assert any(notices in source for source in adapter.call(actor.get_sources))
    return actor


def wait_for_deadline(node, deadline_s, *, within_s):
    start_s = time.monotonic()
    wait_until(
        lambda: abs((adapter.get_draining_nodes().get(node) or 0.0) - deadline_s) <= 0.6,
        timeout_s=15,
        what=lambda: f"{deadline_s} in {adapter.get_draining_nodes()}",
        every_s=0.02,
    )
    assert time.monotonic() - start_s < within_s


def get_notices(listener):
    news = ray.get(listener.get_news.remote())
    return {(n.departure.provider, n.departure.reason): n.departure.deadline_s for _, n in news if n.departure}


def test_the_leader_acknowledges_an_event_once_others_train_on_without_its_machine(cluster, clouds, data, tmp_path):
    azure = clouds["azure"]
    overrides = {"train.steps": 100_000, "cluster.notices": "azure", "checkpoint.every_steps": 1000}
    run = Run(cluster, data, tmp_path, **overrides)
    run.start()
    run.wait_for_step(10, world_size=2, timeout_s=180)
    wait_until(lambda: azure.names == [azure.name], timeout_s=20, what="both watches know their names")
    deadline_s = time.time() + 300
    azure.put(
        azure.build_event(deadline_s, EventId="ours", Resources=["trainers_1"]),
        azure.build_event(deadline_s, EventId="shared", Resources=["trainers_1", "a-stranger"]),
        azure.build_event(deadline_s, EventId="theirs", Resources=["a-stranger"]),
    )
    run.wait_for(lambda: azure.started, what="an acknowledgement")
    time.sleep(3)  # for acknowledgements that must not come
    assert azure.started == ["ours"]
    alone = [row for row in run.rows() if row["world_size"] == 1]
    assert parse_utc(alone[0]["time_utc"]) < azure.started_s[0] < deadline_s - 200
    assert next(read_rows(run.dir.attempts))["reason"] == "azure: scheduled event Preempt"
    azure.withdraw()
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()
    wait_until(lambda: not adapter.get_draining_nodes(), timeout_s=20, what="Ray ends the node that nobody needs")
    cluster.ids = [node.id for node in adapter.get_worker_nodes(ClusterConfig())]
    cluster.add()


def test_every_server_is_heard_and_ray_drains_with_the_deadline_of_the_notice(cluster, clouds, listener, hook_port):
    node = cluster.ids[0]
    # A node that drains takes no new actor, so all are there before the first notice; each overrules the one before.
    actors = [start_watch(node, name, listener) for name in ("aws", "gcp", "azure")]
    assert adapter.get_draining_nodes() == {}

    wait_for_deadline(node, clouds["aws"].give(120), within_s=1 + 1)
    assert ("aws", "spot interruption (terminate)") in get_notices(listener)
    wait_for_deadline(node, clouds["gcp"].give(30), within_s=1 + 0.5)
    wait_for_deadline(node, clouds["azure"].give(300), within_s=1 + 1)
    request = urllib.request.Request(
        f"http://127.0.0.1:{hook_port}/notice",
        data=b'{"seconds_left": 77}',
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    with urllib.request.urlopen(request):
        wait_for_deadline(node, time.time() + 77, within_s=1 + 0.1)
    path = cluster.folder / f"solvent-notice-{os.getuid()}-{node[:12]}"
    path.write_text("9")
    wait_for_deadline(node, time.time() + 9, within_s=1 + 0.25)
    path.unlink()

    notices = get_notices(listener)
    assert {provider for provider, _ in notices} == {"aws", "gcp", "azure", "plain"}
    assert set(adapter.get_draining_nodes()) == {node}
    lines = [line for _, news in ray.get(listener.get_news.remote()) for line in news.lines]
    # one of the three has the port; the others say so, and go on
    assert len([line for line in lines if "cannot listen on port" in line]) == 2

    # Ray ends a node that drains and has nothing to do; a watch keeps it from that until nobody needs it any more.
    time.sleep(1)
    assert node in {n.id for n in adapter.get_worker_nodes(ClusterConfig())}
    for actor in actors:
        adapter.kill(actor)
    wait_until(
        lambda: node not in {n.id for n in adapter.get_worker_nodes(ClusterConfig())}, timeout_s=10, what="Ray ends it"
    )


@pytest.mark.parametrize(("notices", "lead_s"), [("kubernetes", 15.0), ("runpod", 5.0)])
def test_sigterm_to_ray_start_drains_with_what_the_machine_grants_instead_of_30_seconds(
    cluster, env, listener, notices, lead_s
):
    known = {n["NodeID"] for n in ray.nodes()}
    with (cluster.folder / "ray-start.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.address}", *LEAN],
            env={**get_env(cluster.folder), **env},
            stdout=log,
            stderr=log,
        )
    try:
        (row,) = wait_until(
            lambda: [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in known], timeout_s=180, what="the node"
        )
        actor = start_watch(row["NodeID"], notices, listener)
        sent_s = time.time()
        process.send_signal(signal.SIGTERM)
        wait_for_deadline(row["NodeID"], sent_s + lead_s, within_s=1 + 0.25)
        adapter.kill(actor)
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()
        (cluster.folder / "ray-start.log").unlink()


def test_watches_end_with_who_started_them(cluster):
    @ray.remote(num_cpus=0)
    class Owner:
        def start(self, node):
            start_watch(node, "plain", adapter.get_own_actor())

        def hear_watch(self, node, news):
            pass

    def find_watches():
        return [pid for pid, command in find_processes(cluster.folder).items() if "ray::WatchActor" in command]

    owner = Owner.options(max_concurrency=2).remote()
    ray.get(owner.start.remote(cluster.ids[1]))
    wait_until(find_watches, timeout_s=10, what="a watch")
    ray.kill(owner)
    wait_until(lambda: not find_watches(), timeout_s=10, what="it ends")
