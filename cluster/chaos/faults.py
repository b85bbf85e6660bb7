"""Faults on schedule: which one strikes at which step, and the hand that lets it happen on a local cluster."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.types import Worker

Kind = Literal["kill", "remove", "drain", "add"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong (or a node that comes) once training has reached a step."""

    at_step: int
    fault: Kind
    target: int = 0
    """A rank; the node it runs on for faults that hit nodes."""
    notice_s: float = 15.0
    """drain: seconds from the notice until the node is gone."""


class Victims(Protocol):
    """The cluster that faults strike."""

    def add_node(self) -> str:
        """Start a node."""
        ...

    def remove_node(self, node: str) -> None:
        """Kill a node."""
        ...


class Injector:
    """Lets faults happen as training goes on; feed it what the driver sees.

    A notice runs out in a thread of its own, which `close` waits for. A node starts in the caller's thread, the main
    one: Ray installs signal handlers when it does.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        cluster: Victims,
        *,
        drain: Callable[[str, float], None],
        say: Callable[[str], None],
    ) -> None:
        self._faults = sorted(faults, key=lambda fault: fault.at_step)
        self._cluster = cluster
        self._drain = drain
        self._say = say
        self._threads: list[threading.Thread] = []

    def watch(self, *, step: int, workers: Sequence[Worker]) -> None:
        """Let happen what is due. One fault at a time, and only while a world is at work."""
        if self._faults and workers and step >= self._faults[0].at_step:
            fault = self._faults.pop(0)
            worker = workers[fault.target % len(workers)]
            self._strike(fault, worker)

    def close(self) -> None:
        """Wait for the faults that are under way."""
        for thread in self._threads:
            thread.join()

    def _strike(self, fault: Fault, worker: Worker) -> None:
        node = worker.node[:8]
        match fault.fault:
            case "kill":
                self._say(f"fault: kill -9 of the trainer of rank {worker.rank} on node {node}")
                os.kill(worker.pid, signal.SIGKILL)
            case "remove":
                self._say(f"fault: node {node} goes away without notice")
                self._cluster.remove_node(worker.node)
            case "drain":
                self._say(f"fault: node {node} gets a notice and goes away in {fault.notice_s:g} s")
                self._drain(worker.node, time.time() + fault.notice_s)
                thread = threading.Timer(fault.notice_s, self._remove, [worker.node])
                thread.start()
                self._threads.append(thread)
            case "add":
                node = self._cluster.add_node()[:8]
                self._say(f"fault: node {node} joins")

    def _remove(self, node: str) -> None:
        self._cluster.remove_node(node)
        self._say(f"fault: node {node[:8]} is gone")
