"""The records of nodes and what follows from them: hosts, watches, drains, prices; Ray is a stand-in that notes."""

import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost import KnownPrices
from cluster.node_watch import News
from cluster.notices import Departure, Report
from cluster.runtime.coordinator.descriptors import OTHERS
from cluster.runtime.coordinator.events import InboxEvent, NodeEvent, WatchTold
from cluster.runtime.coordinator.nodes import node_decisions as decisions
from cluster.runtime.coordinator.nodes.fleet import Fleet
from cluster.runtime.coordinator.nodes.node_records import (
    LOST_FOR_S,
    Drain,
    Host,
    HostLink,
    HostStart,
    Node,
    Nodes,
    Notice,
    RayNode,
    RayView,
    Watch,
    follow_ray,
)
from cluster.runtime.coordinator.nodes.ray_nodes import RayWatch
from cluster.runtime.coordinator.records.run_records import open_run_records
from cluster.runtime.ray.adapter import WorkerNode
from cluster.types import Draining, Event, Undrained
from elastic.config import CostConfig, RunConfig
from elastic.errors import SolventError
from elastic.records.rundir import read_rows

EVERY_S = 10.0


class Ray:
    """Notes what is asked of it, on the thread that asks; `end` is the end of a start."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.over: set[str] = set()
        self.refusal = ""
        self.hangs: threading.Event | None = None

    def start_host(self, node: str) -> SimpleNamespace:
        if self.hangs:
            self.hangs.wait(30)
        self.asked.append(("start", node))
        return SimpleNamespace(is_over=lambda: node in self.over, get_failure=lambda: f"no room on {node}")

    def create_watch(self, node: str) -> str:
        self.asked.append(("watch", node))
        return f"watch of {node}"

    def acknowledge(self, watch: str, notice_id: str) -> None:
        self.asked.append((f"acknowledge {notice_id}", watch))

    def end_watch(self, watch: str) -> None:
        self.asked.append(("end", watch))

    def drain(self, node: str, reason: str) -> None:
        self.asked.append((f"drain: {reason}", node))
        if self.refusal:
            raise SolventError(self.refusal)


class Served:
    """A fleet with real records, whose events are taken here as the serving thread does."""

    def __init__(self, folder: str, cost: CostConfig | None = None, *, watches: bool = False) -> None:
        config = RunConfig(cost=cost or CostConfig())
        self.nodes, self.ray, self.records = Nodes(), Ray(), open_run_records(folder, config)
        self.said: list[str] = []
        self.decided: list[Event] = []
        self.failures: list[BaseException] = []
        self.inbox: queue.SimpleQueue[InboxEvent] = queue.SimpleQueue()
        self.living: dict[str, WorkerNode] = {}
        self.draining: dict[str, float | None] = {}
        self.in_use: set[str] | None = None
        self.fleet = Fleet(
            self.nodes,
            self.ray,
            self.records,
            watches=watches,
            start_every_s=EVERY_S,
            start_from_s=0.0,
            most_files=OTHERS + 2,
            say=self.said.append,
            post=self.inbox.put,
            decide=self.decided.append,
            on_failure=self.failures.append,
        )
        self.watch = RayWatch(
            get_living=lambda: list(self.living.values()),
            get_draining=lambda: self.draining,
            nodes=self.nodes,
            prices=KnownPrices(config.cost, say=self.said.append),
            post=self.inbox.put,
        )

    def join(self, *names: str) -> None:
        self.living |= {name: WorkerNode(id=name, num_workers=1, offer="spot") for name in names}

    def look(self, now_s: float = 100.0) -> list[tuple[str, str]]:
        """Have Ray looked at and everything done that follows; return what was asked of it."""
        self.take(self.watch.look(now_s=now_s))
        asked, self.ray.asked = self.ray.asked, []
        return asked

    def take(self, event: NodeEvent) -> None:
        self.fleet.take(event, in_use=self.in_use)
        assert self.fleet._jobs.wait(5)
        while not self.inbox.empty():
            self.fleet.take(self.inbox.get(), in_use=self.in_use)
            assert self.fleet._jobs.wait(5)
        assert not self.failures

    def have_host(self, name: str) -> None:
        node = self.nodes.get(name)
        host = Host(pid=1, connection=HostLink(link=SimpleNamespace(), heard_s=0.0), replica_server=None)
        self.nodes.put(Node(id=name, ray=node.ray, host=host, start=node.start, watch=node.watch, notice=node.notice))


@pytest.fixture
def served(tmp_path) -> Served:
    return Served(str(tmp_path))


@pytest.fixture
def watched(tmp_path) -> Served:
    return Served(str(tmp_path), watches=True)


# ---- hosts


def test_a_host_is_started_again_once_a_start_is_over_and_none_has_come_of_it(served):
    served.join("n1", "n2")
    served.have_host("n2")
    assert served.look(100) == [("start", "n1")]
    assert served.look(200) == []  # it goes on, however long it takes
    served.ray.over.add("n1")
    assert served.look(201) == [("start", "n1")]
    assert served.said == ["node n1: no room on n1; it is tried again"]
    assert served.look(210) == []  # it may be on its way
    served.have_host("n1")
    assert served.look(300) == []


def test_the_start_on_a_node_that_is_gone_is_forgotten(served):
    served.join("n1")
    assert served.look() == [("start", "n1")]
    served.living.clear()
    assert served.look() == []
    assert served.nodes.by_id == {}
    served.join("n1")
    assert served.look() == [("start", "n1")]


def test_a_job_that_hangs_keeps_the_serving_thread_from_nothing(served):
    served.ray.hangs = threading.Event()
    served.join("n1", "n2")
    start_s = time.monotonic()
    served.fleet.take(served.watch.look(now_s=100.0), in_use=None)
    served.draining["n2"] = None
    served.fleet.take(served.watch.look(now_s=101.0), in_use=None)
    assert time.monotonic() - start_s < 5
    assert served.decided == [Draining(node="n2", deadline_s=None, reason="preemption notice")]
    served.ray.hangs.set()
    assert served.fleet._jobs.wait(5)
    assert served.ray.asked == [("start", "n1"), ("start", "n2")], "each is asked for once"


# ---- notices


def test_a_drain_of_ray_is_announced_once_and_again_with_another_deadline(served):
    served.join("n1")
    served.look()
    for deadline_s in (None, None, 50.0, 50.0, 60.0):
        served.draining["n1"] = deadline_s
        served.look()
    assert [event.deadline_s for event in served.decided if isinstance(event, Draining)] == [None, 50.0, 60.0]


def test_a_drain_whose_reason_the_watch_has_told_is_not_announced_from_ray(watched):
    watched.join("n1")
    watched.look()
    departure = Departure(provider="aws", reason="spot interruption", deadline_s=50.0)
    watched.take(WatchTold(node="n1", news=News(lines=("aws: soon",), departure=departure)))
    watched.draining["n1"] = 51.0
    watched.look()
    told = Draining(node="n1", deadline_s=50.0, reason="aws: spot interruption", source="aws")
    assert watched.decided == [told]
    assert watched.said == ["node n1: aws: soon"]


def test_after_a_notice_was_withdrawn_a_drain_of_ray_counts(watched):
    watched.join("n1")
    watched.look()
    departure = Departure(provider="aws", reason="spot interruption", deadline_s=50.0)
    watched.take(WatchTold(node="n1", news=News(departure=departure)))
    watched.take(WatchTold(node="n1", news=News(stays=True)))
    assert watched.decided[-1] == Undrained(node="n1")
    watched.draining["n1"] = 51.0
    watched.look()
    assert watched.decided[-1] == Draining(node="n1", deadline_s=51.0, reason="preemption notice")


def test_a_node_that_was_given_up_is_drained_for_our_reason_and_not_announced_again(served):
    served.join("n1")
    served.look()
    served.fleet.give_up("n1", "nothing on it can train")
    served.draining["n1"] = None
    assert served.look() == [("drain: nothing on it can train", "n1")]
    assert served.decided == [Draining(node="n1", deadline_s=None, reason="nothing on it can train")]


def test_a_node_that_cannot_be_drained_is_named(served):
    served.join("n1")
    served.look()
    served.ray.refusal = "Ray refused"
    served.fleet.give_up("n1", "nothing on it can train")
    served.look()
    assert served.said == ["node n1 could not be drained: Ray refused"]
    assert served.decided == []


def test_too_few_descriptors_for_the_nodes_that_are_there_are_said_once(served):
    served.join("n1", "n2")
    served.look()
    assert served.said == []
    served.join("n3")
    served.look()
    served.look()
    (line,) = served.said
    assert line.startswith("3 nodes need about 259 open files here, and this machine allows 258")


# ---- watches


def test_a_living_node_has_one_watch_and_a_new_one_only_if_it_comes_back(watched):
    watched.join("n1")
    assert ("watch", "n1") in watched.look()
    assert watched.look() == []
    watched.living.clear()
    watched.look()
    watched.join("n1")
    assert ("watch", "n1") in watched.look()


def test_the_watch_of_a_node_that_leaves_is_let_go_once_the_run_does_without_the_node(watched):
    watched.join("n1", "n2")
    watched.look()
    watched.draining["n1"] = None
    assert watched.look() == []  # nobody knows what is safe
    watched.in_use = {"n1", "n2"}
    assert watched.look() == []
    watched.in_use = {"n2"}
    assert watched.look() == [("end", "watch of n1")]
    assert watched.look() == []


def test_a_notice_of_several_machines_is_acknowledged_once_all_of_them_are_clear(watched):
    watched.join("n1", "n2")
    watched.look()
    for name in ("n1", "n2"):
        report = Report(id="e1", machine=f"vm-{name}", machines=("vm-n1", "vm-n2"))
        watched.take(WatchTold(node=name, news=News(reports=(report,))))
        watched.draining[name] = None
    watched.in_use = {"n2"}
    assert watched.look() == []
    watched.in_use = set()
    assert watched.look() == [("acknowledge e1", "watch of n1")]
    assert watched.look() == []
    for name in ("n1", "n2"):
        watched.take(WatchTold(node=name, news=News()))
    assert sorted(watched.look()) == [("end", "watch of n1"), ("end", "watch of n2")]


# ---- money


def test_a_node_that_joins_while_the_price_file_is_missing_is_booked_and_trains(tmp_path):
    cost = CostConfig(usd_per_gpu_hour=3.6, price_file=str(tmp_path / "no.yaml"))
    served = Served(str(tmp_path / "run"), cost)
    served.join("n")
    served.look(0.0)
    served.records.close(1000.0)
    assert served.records.summary()["usd"] == pytest.approx(1.0)  # 1000 s at 3.6 USD an hour
    assert "no.yaml' cannot be read" in served.said[0]


def test_a_node_is_paid_from_when_ray_shows_it_until_ray_shows_it_no_more(served):
    served.join("n1")
    served.look(100.0)
    assert served.records.ledger.get_open() == ["n1"]
    served.living.clear()
    served.look(160.0)
    assert served.records.ledger.get_open() == []
    served.records.close(1000.0)
    assert served.records.summary()["paid_gpu_s"] == 60.0


def test_a_node_whose_host_came_back_before_ray_was_asked_waits_and_does_not_start(served):
    served.have_host("n1")
    served.join("n1")
    served.look(100.0)
    served.records.close(160.0)
    rows = list(read_rows(served.records.run_dir.ledger))
    assert [(row["node"], row["state"]) for row in rows] == [("n1", "wait")]


# ---- the pure parts, for whatever Ray says


NAMES = ("n1", "n2", "n3")


@st.composite
def records(draw: st.DrawFn) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        drain = draw(st.none() | st.builds(Drain, deadline_s=st.none() | st.sampled_from([1.0, 2.0])))
        facts = WorkerNode(id=name, num_workers=1, offer="")
        host = Host(pid=1, connection=HostLink(link=SimpleNamespace(), heard_s=0.0), replica_server=None)
        nodes[name] = Node(
            id=name,
            ray=draw(st.none() | st.just(RayNode(facts=facts, usd_per_gpu_hour=0.0, drain=drain))),
            host=draw(st.none() | st.just(host)),
            lost_s=draw(st.none() | st.floats(0, 200)),
            start=draw(st.none() | st.builds(HostStart, began_s=st.floats(0, 200), is_over=st.booleans())),
            watch=draw(st.none() | st.builds(Watch, actor=st.none() | st.just("a"), is_let_go=st.booleans())),
            notice=draw(st.none() | st.builds(Notice, deadline_s=st.none() | st.just(1.0), is_from_ray=st.booleans())),
        )
    return nodes


@settings(max_examples=200, deadline=None)
@given(records(), st.sets(st.sampled_from(NAMES)), st.floats(0, 300))
def test_ray_s_view_is_taken_as_it_is_and_no_host_or_fresh_loss_is_forgotten(nodes, living, now_s):
    seen = {name: RayNode(facts=WorkerNode(id=name, num_workers=1, offer=""), usd_per_gpu_hour=1.0) for name in living}
    after = follow_ray(nodes, RayView(at_s=0.0, nodes=seen, ended_starts={}), now_s=now_s)
    assert {name: node.ray for name, node in after.items() if node.ray} == seen
    for name, node in nodes.items():
        is_fresh = node.lost_s is not None and now_s - node.lost_s < LOST_FOR_S
        if node.host or is_fresh:
            assert (after[name].host, after[name].lost_s) == (node.host, node.lost_s)
        elif name not in living:
            assert name not in after


@settings(max_examples=200, deadline=None)
@given(records(), st.floats(0, 300))
def test_a_host_is_started_only_where_none_is_and_no_start_goes_on(nodes, now_s):
    for name in decisions.find_hosts_to_start(nodes, now_s=now_s, every_s=EVERY_S):
        node = nodes[name]
        assert node.ray
        assert node.host is None
        assert node.start is None or (node.start.is_over and now_s > node.start.began_s + EVERY_S)


@settings(max_examples=200, deadline=None)
@given(records(), st.sets(st.sampled_from(NAMES)))
def test_only_nodes_that_leave_and_are_not_needed_are_let_go(nodes, in_use):
    clear = decisions.find_clear(nodes, in_use=in_use)
    for name in clear:
        assert nodes[name].ray.drain
        assert name not in in_use
    assert set(decisions.find_watches_to_let_go(nodes, clear)) <= clear


# ---- many threads read, one writes


def test_a_snapshot_does_not_change_under_its_reader(served):
    served.join(*(f"n{i}" for i in range(50)))
    served.look()
    before = served.nodes.by_id
    names = list(iterate_slowly(before, served))
    assert names == [f"n{i}" for i in range(50)]
    assert len(served.nodes.by_id) == 0


def iterate_slowly(records: dict[str, Node], served: Served) -> Iterator[str]:
    for name in records:
        served.living.pop(name)
        served.look(time.time())
        yield name
