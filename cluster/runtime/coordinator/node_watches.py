"""Node watches under Ray: one 0-CPU actor per node reads its provider's notices; the coordinator leads them.

A watch drains its own node, so that Ray knows the true deadline, and tells the coordinator why. It is an actor that
the coordinator owns: it ends with it, and nothing is left. While it lives it keeps Ray from ending a node that drains
and has nothing left to do, so the coordinator lets go of the watches of nodes that it does not need any more.
"""

import contextlib
import threading
import time
from collections.abc import Set as AbstractSet
from typing import Any

from cluster.node_watch import News, NodeWatch
from cluster.notices import Departure, Report, find_acknowledgeable
from cluster.providers import Feed, choose, load
from cluster.runtime.node.priority import take_priority_of
from cluster.runtime.ray import adapter
from cluster.runtime.this_machine import build_machine
from elastic.config import RunConfig
from elastic.errors import SolventError

_HEARD_WITHIN_S = 1.0
"""A node's drain waits so long until the coordinator has heard why: from Ray it would learn of the drain alone."""


class WatchActor:
    """The actor on a node."""

    def __init__(self, coordinator: Any, *, node: str, notices: str, grace_s: float, leave_before_s: float) -> None:
        """Start to read; `coordinator` is the actor whose `hear_watch(node, news)` takes the news."""
        take_priority_of(adapter.get_raylet_pid())

        def tell(news: News) -> None:
            if news.departure is None:
                adapter.post(coordinator.hear_watch, node, news)
                return
            with contextlib.suppress(SolventError):  # it is gone, or slow: then it hears of the drain
                adapter.call(coordinator.hear_watch, node, news, timeout_s=_HEARD_WITHIN_S)

        def drain(departure: Departure) -> None:
            adapter.drain_node(
                node, reason=f"{departure.provider}: {departure.reason}", deadline_s=departure.deadline_s
            )

        machine = build_machine(node, grace_s=grace_s, get_self_drain=adapter.SelfDrainLog().read)
        feeds: dict[str, list[Feed]] = {}
        for name in choose(notices, machine):
            try:
                feeds[name] = load(name).open_feeds(machine)
            except SolventError as error:
                tell(News(lines=(f"{name}: {error}",)))
        self._watch = NodeWatch(feeds, drain=drain, tell=tell, now_s=time.time, leave_before_s=leave_before_s)
        self._watch.start()

    def get_sources(self) -> list[str]:
        """Return what is read, once the actor is up."""
        return self._watch.get_sources()

    def acknowledge(self, notice_id: str) -> None:
        """Let the provider go ahead with a notice."""
        self._watch.acknowledge(notice_id)


class Watches:
    """The coordinator's end: a watch on every node, what they reported, and which may be let go.

    `hear` is called by the actor's threads, `follow` by the coordinator's own.
    """

    def __init__(self, coordinator: Any, config: RunConfig) -> None:
        self._is_on = config.cluster.notices != "off"
        self._fields: dict[str, Any] = {
            "coordinator": coordinator,
            "notices": config.cluster.notices,
            "grace_s": config.fault.term_grace_s,
            "leave_before_s": config.fault.leave_before_s,
        }
        self._actors: dict[str, Any] = {}
        self._let_go: set[str] = set()
        self._reports: dict[str, tuple[Report, ...]] = {}
        self._acknowledged: set[str] = set()
        self._lock = threading.Lock()

    def hear(self, node: str, news: News) -> None:
        """Keep what a watch reports of notices for several machines."""
        with self._lock:
            self._reports[node] = news.reports

    def follow(self, nodes: AbstractSet[str], *, clear: AbstractSet[str]) -> None:
        """Watch these nodes; acknowledge and let go what is clear.

        Args:
            nodes: all that live.
            clear: those of them that leave, and that the run does not need any more.
        """
        if not self._is_on:
            return
        for node in nodes - self._actors.keys():
            self._actors[node] = adapter.create_on_node(node, WatchActor, {**self._fields, "node": node})
        with self._lock:
            for node in self._actors.keys() - nodes:
                del self._actors[node]
                self._reports.pop(node, None)
            reports = dict(self._reports)
        for notice_id, node in find_acknowledgeable(reports, clear).items():
            if notice_id not in self._acknowledged:
                self._acknowledged.add(notice_id)
                adapter.post(self._actors[node].acknowledge, notice_id)
        for node in clear - self._let_go:
            if not reports.get(node):  # its notice may have to be acknowledged once others are clear, too
                self._let_go.add(node)
                adapter.kill(self._actors[node])
