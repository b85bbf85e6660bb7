"""Keeps the records of the nodes, and has done what the nodes need: hosts started, watches led, drains announced.

All of it is called on the serving thread. What talks to Ray is a job on a thread of its own, and its end an event.
"""

import time
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from cluster.node_watch import News
from cluster.runtime.coordinator.background import Background
from cluster.runtime.coordinator.descriptors import describe_shortage
from cluster.runtime.coordinator.events import (
    DrainAsked,
    InboxEvent,
    NodeEvent,
    StartSubmitted,
    WatchCreated,
    WatchTold,
)
from cluster.runtime.coordinator.nodes import node_decisions as decisions
from cluster.runtime.coordinator.nodes.node_records import HostStart, Nodes, Notice, RayView, Start, Watch
from cluster.runtime.coordinator.records.run_records import RunRecords
from cluster.types import Draining, Event, Undrained
from elastic.errors import SolventError


class RayJobs(Protocol):
    """What is asked of Ray for nodes; each may take its time."""

    def start_host(self, node: str) -> Start:
        """Have a host started on a node."""
        ...

    def create_watch(self, node: str) -> Any:
        """Create the watch of a node."""
        ...

    def acknowledge(self, watch: Any, notice_id: str) -> None:
        """Have a watch let its provider go ahead with a notice."""
        ...

    def end_watch(self, watch: Any) -> None:
        """End a watch."""
        ...

    def drain(self, node: str, reason: str) -> None:
        """Have nothing placed on a node any more, and an autoscaler replace it.

        Raises:
            SolventError: Ray does not.
        """
        ...


class Fleet:
    """See the module.

    Args:
        ray: does what blocks, on a thread of its own.
        watches: whether notices are read.
        start_every_s: a host is started again on a node no sooner than this.
        start_from_s: none is started before this Unix time.
        most_files: how many descriptors this process may have; None: as many as it likes.
        say: takes a line for people.
        post: has an event taken on the serving thread; from any thread.
        decide: has the controller take an event.
        on_failure: takes what a job raised.
    """

    def __init__(
        self,
        nodes: Nodes,
        ray: RayJobs,
        records: RunRecords,
        *,
        watches: bool,
        start_every_s: float,
        start_from_s: float,
        most_files: int | None,
        say: Callable[[str], None],
        post: Callable[[InboxEvent], None],
        decide: Callable[[Event], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._nodes, self._ray, self._records = nodes, ray, records
        self._watches, self._start_every_s, self._start_from_s = watches, start_every_s, start_from_s
        self._most_files, self._is_short = most_files, False
        self._say, self._post, self._decide = say, post, decide
        self._jobs = Background("ray-jobs", on_failure=on_failure)

    def take(self, event: NodeEvent, *, in_use: Set[str] | None) -> None:
        """Take an event in, and have done what follows from it.

        Args:
            in_use: the nodes whose trainers or memories the run needs; None: all of them.
        """
        match event:
            case RayView():
                self._follow(event, in_use)
            case WatchTold(node=node, news=news):
                self._take_news(node, news)
            case StartSubmitted(node=node, start=task):
                record = self._nodes.get(node)
                if record.start:
                    self._nodes.put(replace(record, start=replace(record.start, task=task)))
            case WatchCreated(node=node, actor=actor):
                record = self._nodes.get(node)
                if record.watch:  # or its node has gone meanwhile, and the actor with the last that knows of it
                    self._nodes.put(replace(record, watch=replace(record.watch, actor=actor)))
            case DrainAsked(node=node, reason=reason, problem=problem):
                if problem:
                    self._say(f"node {node[:8]} could not be drained: {problem}")
                else:
                    self._decide(Draining(node=node, deadline_s=None, reason=reason))

    def give_up(self, node: str, reason: str) -> None:
        """Have a node drained on which nothing can train."""
        # Ray would say "preemption notice"
        self._nodes.put(replace(self._nodes.get(node), notice=Notice(deadline_s=None, is_from_ray=False)))
        self._jobs.submit(partial(self._drain, node, reason))

    def _drain(self, node: str, reason: str) -> None:
        problem = ""
        try:
            self._ray.drain(node, reason)
        except SolventError as error:
            problem = str(error)
        self._post(DrainAsked(node=node, reason=reason, problem=problem))

    # ---- Ray's view

    def _follow(self, view: RayView, in_use: Set[str] | None) -> None:
        before = {node.id for node in self._nodes.by_id.values() if node.ray}
        for name in view.nodes.keys() - before:
            seen = view.nodes[name]
            self._records.join(name, view.at_s, gpus=seen.facts.num_workers, usd_per_gpu_hour=seen.usd_per_gpu_hour)
            if self._nodes.get(name).host:  # of a coordinator before this one: it was here first
                self._records.host_ready(name, view.at_s)
        for name in before - view.nodes.keys():
            self._records.leave(name, view.at_s)
        self._nodes.follow_ray(view, now_s=time.monotonic())
        if not self._is_short and (shortage := describe_shortage(self._most_files, len(view.nodes))):
            self._is_short = True
            self._say(shortage)
        if view.at_s >= self._start_from_s:
            self._start_hosts(view.at_s)
        for name, deadline_s in decisions.find_drains_to_announce(self._nodes.by_id).items():
            self._nodes.put(replace(self._nodes.get(name), notice=Notice(deadline_s=deadline_s, is_from_ray=True)))
            self._decide(Draining(node=name, deadline_s=deadline_s, reason="preemption notice"))
        if self._watches:
            clear = frozenset[str]() if in_use is None else decisions.find_clear(self._nodes.by_id, in_use=in_use)
            self._lead_watches(clear)

    def _start_hosts(self, now_s: float) -> None:
        for name in decisions.find_hosts_to_start(self._nodes.by_id, now_s=now_s, every_s=self._start_every_s):
            record = self._nodes.get(name)
            if record.start and record.start.failure:
                self._say(f"node {name[:8]}: {record.start.failure}; it is tried again")
            self._nodes.put(replace(record, start=HostStart(began_s=now_s)))
            self._jobs.submit(partial(self._start_host, name))

    def _start_host(self, node: str) -> None:
        self._post(StartSubmitted(node=node, start=self._ray.start_host(node)))

    # ---- watches

    def _lead_watches(self, clear: Set[str]) -> None:
        for name in decisions.find_watches_to_create(self._nodes.by_id):
            self._nodes.put(replace(self._nodes.get(name), watch=Watch()))
            self._jobs.submit(partial(self._create_watch, name))
        for due in decisions.find_acknowledgements(self._nodes.by_id, clear):
            record = self._nodes.get(due.node)
            assert record.watch is not None, "it has reported the notice"
            asked = record.watch.acknowledged | {due.notice_id}
            self._nodes.put(replace(record, watch=replace(record.watch, acknowledged=asked)))
            self._jobs.submit(partial(self._ray.acknowledge, record.watch.actor, due.notice_id))
        for name in decisions.find_watches_to_let_go(self._nodes.by_id, clear):
            record = self._nodes.get(name)
            assert record.watch is not None, "it is let go"
            self._nodes.put(replace(record, watch=replace(record.watch, is_let_go=True)))
            self._jobs.submit(partial(self._ray.end_watch, record.watch.actor))

    def _create_watch(self, node: str) -> None:
        self._post(WatchCreated(node=node, actor=self._ray.create_watch(node)))

    def _take_news(self, node: str, news: News) -> None:
        for line in news.lines:
            self._say(f"node {node[:8]}: {line}")
        record = self._nodes.get(node)
        # it may speak before we hear that it is there
        record = replace(record, watch=replace(record.watch or Watch(), reports=news.reports))
        if departure := news.departure:
            record = replace(record, notice=Notice(deadline_s=departure.deadline_s, is_from_ray=False))
        if news.stays:
            record = replace(record, notice=None)
        self._nodes.put(record)
        if departure := news.departure:
            reason = f"{departure.provider}: {departure.reason}"
            self._decide(Draining(node=node, deadline_s=departure.deadline_s, reason=reason, source=departure.provider))
        if news.stays:
            self._decide(Undrained(node=node))
