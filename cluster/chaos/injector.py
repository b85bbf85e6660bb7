"""The hand that lets faults happen to a run on a local cluster; `schedule` says which, whom and when."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from cluster.chaos.faults import Fault, Phase
from cluster.chaos.process_tree import find_family, is_of
from cluster.chaos.strikes import Schedule, Strike, get_phase
from cluster.types import Scene, Slot, Worker

_TRAINER = "cluster.runtime.node.host"
"""In the command line of hosts and of the trainers they fork."""
_AGENT = "RayTrainWorker"


class Victims(Protocol):
    """The cluster that faults strike; a node is named by its id."""

    @property
    def nodes_by_index(self) -> Sequence[str | None]:
        """Every node ever started, oldest first; None in the place of one that is gone."""
        ...

    def add_node(self) -> str:
        """Start a node."""
        ...

    def remove_node(self, node: str) -> None:
        """Kill a node."""
        ...

    def get_raylet(self, node: str) -> int:
        """Return the process id of the node's Ray daemon."""
        ...


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What has happened, for the record."""

    fault: str
    step: int
    elapsed_s: float
    phase: Phase | None
    """What it interrupted; None: no world was at work."""
    what: str
    is_add: bool = False
    due_s: float | None = None
    """Seconds after the first step at which it was to happen; None: it was asked for by a step."""


@dataclass(frozen=True, kw_only=True)
class _Later:
    """The second half of a fault."""

    due_s: float
    act: Callable[[], None]
    is_cure: bool
    """It lets something go on: it must happen even if the run has ended before it is due."""


def _cannot(*_: object) -> NoReturn:
    raise AssertionError("a fault was planned that nothing here can bring about")


class Injector:
    """Lets faults happen as training goes on; feed it what is seen of the run, often, and `close` it.

    All of it happens in the caller's thread, the main one: Ray installs signal handlers when a node starts.

    Args:
        least_nodes: that training needs; with fewer a node that was to come later comes at once.
        drain: announces that a node goes away at a Unix time.
        terminate: does to a node what SIGTERM does.
        restart_driver: kills the driver with -9 and starts it again.
        spoil_storage: lets storage suffer from a fault until a Unix time.
    """

    def __init__(
        self,
        schedule: Schedule,
        cluster: Victims,
        *,
        drain: Callable[[str, float], None],
        say: Callable[[str], None],
        least_nodes: int = 1,
        terminate: Callable[[str], None] = _cannot,
        restart_driver: Callable[[], None] = _cannot,
        spoil_storage: Callable[[Fault, float], None] = _cannot,
    ) -> None:
        self.struck: list[Struck] = []
        self._schedule = schedule
        self._cluster = cluster
        self._drain = drain
        self._say = say
        self._least_nodes = least_nodes
        self._terminate = terminate
        self._restart_driver = restart_driver
        self._spoil_storage = spoil_storage
        self._later: list[_Later] = []
        self._leaving: set[str] = set()
        """Nodes whose end is announced: they are hit already."""
        self._first_step_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first step; negative before it."""
        return -1.0 if self._first_step_s is None else time.time() - self._first_step_s

    @property
    def missed(self) -> list[Fault]:
        """The faults that have not struck."""
        return self._schedule.waiting

    @property
    def is_done(self) -> bool:
        """Whether every fault has struck and run its course."""
        return not self.missed and not self._later

    @property
    def brings_nodes(self) -> bool:
        """Whether a node is still to come."""
        return any(fault.fault == "add" for fault in self.missed)

    def is_near(self, scene: Scene) -> bool:
        """Tell whether a fault waits for nothing but a save or the start of a world, which are over soon."""
        return self._schedule.waits_for_moment(step=scene.step, elapsed_s=self.elapsed_s)

    def watch(self, scene: Scene, *, is_saving: bool = False) -> None:
        """Let happen what is due."""
        self.act_due()
        if self._first_step_s is None and scene.step:
            self._first_step_s = time.time()
        nodes = self._cluster.nodes_by_index
        strikes = self._schedule.take_due(
            scene,
            nodes=[node if node not in self._leaving else None for node in nodes],
            elapsed_s=self.elapsed_s,
            is_saving=is_saving,
            lacks_nodes=len(nodes) - nodes.count(None) < self._least_nodes,
        )
        missed: list[Strike] = []
        for strike in strikes:
            is_behind = any(strike.comes_after(other) for other in missed)  # a file reads as a story
            what = None if is_behind else self._strike(strike, scene)
            if what is None:
                missed.append(strike)
                continue
            self._say(f"fault: {what}")
            self.struck.append(
                Struck(
                    fault=str(strike.fault),
                    step=scene.step,
                    elapsed_s=round(self.elapsed_s, 2),
                    phase=get_phase(scene, is_saving=is_saving),
                    what=what,
                    is_add=strike.fault.fault == "add",
                    due_s=strike.fault.at_s,
                )
            )
        for strike in reversed(missed):
            self._schedule.put_back(strike)

    def act_due(self) -> None:
        """Finish the faults whose time is up; works without a view of the run."""
        now_s = time.time()
        due = [later for later in self._later if later.due_s <= now_s]
        self._later = [later for later in self._later if later.due_s > now_s]
        for later in sorted(due, key=lambda later: later.due_s):
            later.act()

    def close(self) -> None:
        """Let go on what is still held up; a node whose notice has not run out is spared."""
        for later in self._later:
            if later.is_cure:
                later.act()
        self._later = []

    def _strike(self, strike: Strike, scene: Scene) -> str | None:
        """Let it happen and say what did; None if who was to be hit had just gone."""
        fault = strike.fault
        if strike.worker:
            return self._strike_trainer(fault, strike.worker, scene)
        if strike.node:
            return self._strike_node(fault, strike.node)
        if fault.fault == "add":
            is_early = fault.at_step is not None and scene.step < fault.at_step
            why = f", before step {fault.at_step}: too few nodes are left to reach it" if is_early else ""
            return f"node {self._cluster.add_node()[:8]} joins{why}"
        if fault.fault == "driver_kill":
            self._restart_driver()
            return "kill -9 of the driver, which is started again"
        self._spoil_storage(fault, time.time() + fault.for_s)
        return f"{fault.fault.replace('_', ' is ')} for {fault.for_s:g} s"

    def _strike_trainer(self, fault: Fault, worker: Worker, scene: Scene) -> str | None:
        where = f"rank {worker.rank} on node {worker.node[:8]}"
        if fault.fault == "kill":
            return f"kill -9 of the trainer of {where}" if _signal([worker.pid], signal.SIGKILL, _TRAINER) else None
        if fault.fault == "agent_kill":
            agent = scene.agents.get(Slot(worker.node, worker.slot), 0)
            return f"kill -9 of the agent of {where}" if _signal([agent], signal.SIGKILL, _AGENT) else None
        pids = [worker.pid] if fault.scope == "trainer" else self._find_processes(worker.node, scene)
        if not _signal(pids, signal.SIGSTOP, _TRAINER if fault.scope == "trainer" else ""):
            return None
        self._in(fault.for_s, lambda: self._thaw(pids, worker.node), is_cure=True)
        whom = (
            f"the trainer of {where}" if fault.scope == "trainer" else f"{len(pids)} processes on the node of {where}"
        )
        return f"SIGSTOP of {whom} for {fault.for_s:g} s"

    def _strike_node(self, fault: Fault, node: str) -> str:
        if fault.fault == "remove":
            self._cluster.remove_node(node)
            return f"node {node[:8]} goes away without notice"
        if fault.fault == "drain":
            self._drain(node, time.time() + fault.notice_s)
            left_s, how = fault.notice_s, "a notice"
        else:
            self._terminate(node)
            left_s, how = fault.grace_s, "SIGTERM"
        self._leaving.add(node)
        self._in(left_s, lambda: self._remove(node))
        return f"node {node[:8]} gets {how} and goes away in {left_s:g} s"

    def _in(self, seconds: float, act: Callable[[], None], *, is_cure: bool = False) -> None:
        self._later.append(_Later(due_s=time.time() + seconds, act=act, is_cure=is_cure))

    def _remove(self, node: str) -> None:
        if node in self._cluster.nodes_by_index:
            self._cluster.remove_node(node)
            self._say(f"fault: node {node[:8]} is gone")

    def _thaw(self, pids: Sequence[int], node: str) -> None:
        _signal(pids, signal.SIGCONT)
        self._say(f"fault: SIGCONT on node {node[:8]}")

    def _find_processes(self, node: str, scene: Scene) -> list[int]:
        """Return every process of a node: Ray's daemon and workers, the host (which left them) and its trainers."""
        return find_family([self._cluster.get_raylet(node), *([scene.hosts[node]] if node in scene.hosts else [])])


def _signal(pids: Sequence[int], number: signal.Signals, command: str = "") -> bool:
    """Send a signal to those that live (and, with `command`, are what they were taken for); False if none does."""
    living = [pid for pid in pids if pid and is_of(pid, command)]
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(living)
