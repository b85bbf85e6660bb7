"""What the nodes need, decided from their records alone: hosts to start, drains to announce, watches to let go. Pure.

Whoever carries a decision out notes that in the record at once, so that it is not taken again.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from cluster.notices import find_acknowledgeable
from cluster.runtime.coordinator.nodes.node_records import Node

Records = Mapping[str, Node]


def find_hosts_to_start(nodes: Records, *, now_s: float, every_s: float) -> list[str]:
    """Return the living nodes that lack a host and whose start before, if any, is over and came to nothing.

    A start that goes on is waited for. Each takes a process of Ray's, which imports for seconds: on a slow machine one
    more would make all of them slower, until there is time for nothing else.

    Args:
        every_s: not sooner than so long after the start before.
    """
    return [node.id for node in nodes.values() if node.ray and not node.host and _may_start(node, now_s, every_s)]


def _may_start(node: Node, now_s: float, every_s: float) -> bool:
    return node.start is None or (node.start.is_over and now_s - node.start.began_s > every_s)


def find_drains_to_announce(nodes: Records) -> dict[str, float | None]:
    """Return the deadlines of Ray's drains that are news, by node.

    Of a node whose watch has told why it goes, or that we gave up ourselves, more is known than Ray says.
    """
    return {
        node.id: node.ray.drain.deadline_s
        for node in nodes.values()
        if node.ray and node.ray.drain and _is_news(node, node.ray.drain.deadline_s)
    }


def _is_news(node: Node, deadline_s: float | None) -> bool:
    return node.notice is None or (node.notice.is_from_ray and node.notice.deadline_s != deadline_s)


def find_watches_to_create(nodes: Records) -> list[str]:
    """Return the living nodes without a watch."""
    return [node.id for node in nodes.values() if node.ray and node.watch is None]


def find_clear(nodes: Records, *, in_use: Set[str]) -> frozenset[str]:
    """Return which living nodes that leave are not needed any more."""
    return frozenset(node.id for node in nodes.values() if node.ray and node.ray.drain and node.id not in in_use)


@dataclass(frozen=True, kw_only=True)
class Acknowledgement:
    """The watch of a node shall let the provider go ahead with a notice."""

    node: str
    notice_id: str


def find_acknowledgements(nodes: Records, clear: Set[str]) -> list[Acknowledgement]:
    """Return the notices that may be acknowledged now, and no watch was asked to."""
    watches = {node.id: node.watch for node in nodes.values() if node.watch and node.watch.actor is not None}
    asked = {notice_id for watch in watches.values() for notice_id in watch.acknowledged}
    ready = find_acknowledgeable({name: watch.reports for name, watch in watches.items()}, clear)
    return [Acknowledgement(node=name, notice_id=id_) for id_, name in ready.items() if id_ not in asked]


def find_watches_to_let_go(nodes: Records, clear: Set[str]) -> list[str]:
    """Return the clear nodes whose watch only keeps Ray from ending them.

    One that has reported a notice of several machines stays: that may have to be acknowledged once others are clear.
    """
    return [
        node.id
        for node in nodes.values()
        if node.id in clear
        and node.watch
        and node.watch.actor is not None
        and not node.watch.is_let_go
        and not node.watch.reports
    ]
