"""Node watches under Ray: one 0-CPU actor per node reads its provider's notices; the coordinator leads them.

A watch drains its own node, so that Ray knows the true deadline, and tells the coordinator why. It is an actor that
the coordinator owns: it ends with it, and nothing is left. While it lives it keeps Ray from ending a node that drains
and has nothing left to do, so the coordinator lets go of the watches of nodes that it does not need any more.
"""

import contextlib
import time
from typing import Any

from cluster.node_watch import News, NodeWatch
from cluster.notices import Departure
from cluster.providers import Feed, choose, load
from cluster.runtime.node.priority import take_priority_of
from cluster.runtime.ray import adapter
from cluster.runtime.this_machine import build_machine
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
