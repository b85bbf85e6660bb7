"""What is known of each node, in one record: Ray's view, host, claims, watch, notice, price.

The serving thread alone writes; each write swaps the mapping as a whole, so any thread reads a snapshot without a lock.
What to do about a node is decided by pure functions over these records (`node_decisions`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cluster.controller import Holder
from cluster.notices import Report
from cluster.runtime.messages import HostHello, HostMessage
from cluster.runtime.ray.adapter import WorkerNode
from elastic.checkpoint.replicas.placement import NodeLabels
from elastic.ports import Address
from elastic.transport import Link

LOST_FOR_S = 30.0
"""For so long after the end of its host a node takes no new agents, unless another host shows that it lives."""


class Start(Protocol):
    """The start of one host, under way or over."""

    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        ...

    def get_failure(self) -> str:
        """Return what it has failed of; empty if it has not, or goes on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Ray places nothing on the node any more."""

    deadline_s: float | None
    """Unix time; None: nobody knows when the node goes."""


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """A living node as Ray and the prices have it."""

    facts: WorkerNode
    usd_per_gpu_hour: float
    """When it joined; its account keeps that."""
    drain: Drain | None = None


@dataclass(frozen=True, kw_only=True)
class RayView:
    """What the watching thread saw at one time."""

    at_s: float
    nodes: Mapping[str, RayNode]
    ended_starts: Mapping[str, tuple[Start, str]]
    """Starts of hosts that are over, by node, and what each failed of; empty: of nothing."""


@dataclass(kw_only=True, eq=False)
class HostLink:
    """The connection of a host; unlike the records it changes with each message, and only its server looks at it."""

    link: Link[HostHello | HostMessage]
    heard_s: float
    """On the monotonic clock, as the clock may be set."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The process that holds a node's trainers, for as long as its connection stands."""

    pid: int
    connection: HostLink
    replica_server: Address | None
    """Where the memory of the node is served."""
    holders: Mapping[str, Holder | None] = field(default_factory=dict[str, Holder | None])
    """Whose agents hold its slots, as it said last."""


@dataclass(frozen=True, kw_only=True)
class HostStart:
    """The last start of a host on the node."""

    began_s: float
    task: Start | None = None
    """None: it is being handed to Ray."""
    is_over: bool = False
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The actor that reads the notices of the node's provider."""

    actor: Any | None = None
    """None: it is being created."""
    reports: tuple[Report, ...] = ()
    """All notices of several machines that hold now."""
    acknowledged: frozenset[str] = frozenset()
    """The notices that it was asked to acknowledge."""
    is_let_go: bool = False


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What the controller was told last of the node's end."""

    deadline_s: float | None
    is_from_ray: bool
    """Nobody knows more than that Ray drains the node: a new deadline of Ray's is news."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node; what is None is not there, or not known."""

    id: str
    ray: RayNode | None = None
    host: Host | None = None
    lost_s: float | None = None
    """When its last host went, on the monotonic clock; none has come since."""
    start: HostStart | None = None
    watch: Watch | None = None
    notice: Notice | None = None

    @property
    def labels(self) -> NodeLabels:
        """What the node may share the fate of others by."""
        if self.ray is None:
            return NodeLabels()
        return NodeLabels(zone=self.ray.facts.zone, capacity=self.ray.facts.capacity)


class Nodes:
    """The records of all nodes. One thread calls `put` and `follow_ray`; any may read."""

    def __init__(self) -> None:
        self._by_id: Mapping[str, Node] = {}

    @property
    def by_id(self) -> Mapping[str, Node]:
        """All records as they are now; what is returned does not change any more."""
        return self._by_id

    def get(self, node: str) -> Node:
        """Return the record of a node; an empty one if nothing is known of it."""
        return self._by_id.get(node) or Node(id=node)

    def put(self, node: Node) -> None:
        """Replace the record of a node."""
        self._by_id = {**self._by_id, node.id: node}

    def follow_ray(self, view: RayView, *, now_s: float) -> None:
        """Take in what Ray says of all nodes; see the function of this name."""
        self._by_id = follow_ray(self._by_id, view, now_s=now_s)

    def get_pids(self) -> dict[str, int]:
        """Return the processes of the hosts, by node."""
        return {node.id: node.host.pid for node in self._by_id.values() if node.host}

    def get_replica_servers(self) -> dict[str, Address]:
        """Return where the memories of the nodes are served."""
        return {
            node.id: node.host.replica_server for node in self._by_id.values() if node.host and node.host.replica_server
        }

    def get_lost(self, *, now_s: float) -> frozenset[str]:
        """Return the nodes whose host has just gone."""
        return frozenset(node.id for node in self._by_id.values() if _is_just_lost(node, now_s))


def follow_ray(nodes: Mapping[str, Node], view: RayView, *, now_s: float) -> Mapping[str, Node]:
    """Return the records after Ray was asked; of a node that is gone from there only its host and its loss are left.

    Args:
        now_s: on the monotonic clock.
    """
    after: dict[str, Node] = {}
    for node in nodes.values():
        if node.id in view.nodes:
            after[node.id] = _take_start(replace(node, ray=view.nodes[node.id]), view)
        elif node.host or _is_just_lost(node, now_s):
            after[node.id] = replace(node, ray=None, start=None, watch=None)
    for name, seen in view.nodes.items():
        if name not in after:
            after[name] = Node(id=name, ray=seen)
    return after


def _take_start(node: Node, view: RayView) -> Node:
    task, failure = view.ended_starts.get(node.id, (None, ""))
    if node.start is None or task is None or node.start.task is not task:  # another one has begun since
        return node
    return replace(node, start=replace(node.start, is_over=True, failure=failure))


def _is_just_lost(node: Node, now_s: float) -> bool:
    return node.lost_s is not None and now_s - node.lost_s < LOST_FOR_S
