"""What the coordinator asks of Ray about nodes: which there are, on a thread that does nothing else, and small jobs."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.cost import KnownPrices
from cluster.runtime.coordinator.nodes.node_records import Drain, Nodes, RayNode, RayView, Start
from cluster.runtime.coordinator.nodes.node_watches import WatchActor
from cluster.runtime.node.start_host import start_host
from cluster.runtime.ray import adapter
from cluster.runtime.ray.adapter import WorkerNode
from elastic.config import RunConfig

WATCH_EVERY_S = 0.5


class RayWatch:
    """Looks at Ray's nodes twice a second.

    Args:
        get_living: returns the nodes that can hold workers.
        get_draining: returns the deadlines of those that Ray drains.
        nodes: tells which hosts are being started.
        prices: of new nodes.
        post: has what was seen taken in.
    """

    def __init__(
        self,
        *,
        get_living: Callable[[], Iterable[WorkerNode]],
        get_draining: Callable[[], Mapping[str, float | None]],
        nodes: Nodes,
        prices: KnownPrices,
        post: Callable[[RayView], None],
    ) -> None:
        self._get_living, self._get_draining = get_living, get_draining
        self._nodes, self._prices, self._post = nodes, prices, post
        self._usd_per_gpu_hour: dict[str, float] = {}

    def run(self, is_over: Callable[[], bool]) -> None:
        """Look until it is over."""
        while not is_over():
            self._post(self.look(now_s=time.time()))
            time.sleep(WATCH_EVERY_S)

    def look(self, *, now_s: float) -> RayView:
        """Return what Ray says now."""
        facts = {node.id: node for node in self._get_living()}
        draining = self._get_draining()
        self._find_prices(facts)
        nodes = {
            name: RayNode(
                facts=node,
                usd_per_gpu_hour=self._usd_per_gpu_hour[name],
                drain=Drain(deadline_s=draining[name]) if name in draining else None,
            )
            for name, node in facts.items()
        }
        return RayView(at_s=now_s, nodes=nodes, ended_starts=self._find_ended_starts())

    def _find_prices(self, facts: Mapping[str, WorkerNode]) -> None:
        if new := facts.keys() - self._usd_per_gpu_hour.keys():
            prices = self._prices.look()
            self._usd_per_gpu_hour |= {name: prices.get_usd_per_gpu_hour(facts[name].offer) for name in new}
        for name in self._usd_per_gpu_hour.keys() - facts.keys():
            del self._usd_per_gpu_hour[name]

    def _find_ended_starts(self) -> dict[str, tuple[Start, str]]:
        """Return which starts of hosts that are waited for are over."""
        ended: dict[str, tuple[Start, str]] = {}
        for node in self._nodes.by_id.values():
            start = node.start
            if node.host is None and start and start.task and not start.is_over and start.task.is_over():
                ended[node.id] = (start.task, start.task.get_failure())
        return ended


class RayNodeJobs:
    """The jobs that a `Fleet` has done.

    Args:
        coordinator: the actor that the watches tell their news.
        get_host_fields: returns what `start_host` needs beside the node's own facts.
    """

    def __init__(self, config: RunConfig, *, coordinator: Any, get_host_fields: Callable[[], dict[str, Any]]) -> None:
        self._get_host_fields = get_host_fields
        self._watch_fields: dict[str, Any] = {
            "coordinator": coordinator,
            "notices": config.cluster.notices,
            "grace_s": config.fault.term_grace_s,
            "leave_before_s": config.fault.leave_before_s,
        }

    def start_host(self, node: str) -> Start:
        """Have a host started on a node."""
        return adapter.NodeTask(node, start_host, node, self._get_host_fields())

    def create_watch(self, node: str) -> Any:
        """Create the watch of a node."""
        return adapter.create_on_node(node, WatchActor, {**self._watch_fields, "node": node})

    def acknowledge(self, watch: Any, notice_id: str) -> None:
        """Have a watch let its provider go ahead with a notice."""
        adapter.post(watch.acknowledge, notice_id)

    def end_watch(self, watch: Any) -> None:
        """End a watch."""
        adapter.kill(watch)

    def drain(self, node: str, reason: str) -> None:
        """Have nothing placed on a node any more, and an autoscaler replace it.

        Raises:
            SolventError: Ray does not.
        """
        adapter.drain_node(node, reason=reason, deadline_s=None)
