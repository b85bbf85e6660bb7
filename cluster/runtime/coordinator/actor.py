"""The coordinator: the only authority on who trains. A detached 0-CPU Ray actor on the head node.

One thread serves the hosts over TCP, feeds `controller.decide` and carries out its actions (`serving`); another asks
Ray twice a second which nodes live or drain (`ray_nodes`). The actor's methods, called by the driver, the agents and
the watches, only post to the first thread or read what it published. It needs no torch.

What it cannot do without is on the storage: if it dies, the driver creates another one, to which the hosts that live
report. That one takes the next generation, so the world that trained on meanwhile is over, and forms a world anew.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from cluster.cost import KnownPrices
from cluster.node_watch import News
from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.coordinator.events import WatchTold
from cluster.runtime.coordinator.nodes.hosts import HOST_SILENT_S
from cluster.runtime.coordinator.nodes.ray_nodes import WATCH_EVERY_S, RayNodeJobs, RayWatch
from cluster.runtime.coordinator.published import Published, Update
from cluster.runtime.coordinator.records.closing import CLOSE_PATIENCE_S, FAILED_PATIENCE_S, Closing, ClosingUp
from cluster.runtime.coordinator.records.row_writer import RowWriter
from cluster.runtime.coordinator.records.run_records import open_run_records
from cluster.runtime.coordinator.serving import Serving
from cluster.runtime.node.priority import take_priority_of
from cluster.runtime.ray import adapter
from cluster.types import DRIVER_GONE, Done, Scene, Stop
from elastic import config as configs
from elastic.awake import AwakeClock
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.records.attempts import next_attempt
from elastic.records.leader import Leadership, lead
from elastic.records.spool import open_run
from elastic.storage import is_url

_GROUPS_PER_GENERATION = 1_000_000
"""More than any coordinator will see: the numbers of its worker groups are above those of the one before."""
DRIVER_BUSY_S = 5.0
"""A driver polls twice a second; one that did within this time is alive."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the coordinators that follow each other under living hosts have in common; their driver keeps it."""

    id: str
    secret: str = field(repr=False)
    port: int = 0
    """Of the coordinator before, where the hosts look for the next one until they are told of another place."""


class Coordinator:
    """See the module; public methods are the actor's interface."""

    def __init__(self, config: dict[str, Any], *, session: Session, lost_s: float | None = None) -> None:
        """Take the lead of a run.

        Args:
            lost_s: when the coordinator before this one was found dead (Unix seconds), if its hosts live.
        """
        take_priority_of(adapter.get_raylet_pid())
        self._config_fields = config
        self._config = configs.from_dict(config)
        self._driver = ""
        self._clock = AwakeClock()
        self._driver_heard_s = 0.0
        """By that clock, as laptops are shut and machines paused: the driver slept as well."""
        self._closing = self._has_failed = False
        self._serve_thread: threading.Thread | None = None
        self._close_lock = threading.Lock()
        self._refusal: SolventError | None = None
        self._opened = ExitStack()
        try:
            run = self._opened.enter_context(open_run(self._config.storage, self._config.run))
            self._leader = lead(run.storage, who="solvent train", at_least=next_attempt(run.dir))
            run.lead(self._leader.check, generation=self._leader.generation)
            self._disk = _get_disk(self._config, self._leader)
        except SolventError as refusal:  # raised here, its text would not reach the driver
            self._refusal = refusal
            self._opened.close()
            threading.Thread(target=self._exit_without_driver, name="refused", daemon=True).start()
            return
        self._ip = adapter.get_own_ip()
        self._out = Published()
        self._run = run
        # rows for an object store wait in a spool, and what leaves it is checked
        check_lead = self._leader.check_known if is_url(self._config.storage) else self._leader.check
        self._writer = RowWriter(check_lead=check_lead, on_failure=self._fail, say=self._out.say)
        self._records = open_run_records(
            str(run.dir.root),
            self._config,
            check_lead=check_lead,
            append=self._writer.append,
            lost_s=lost_s,
        )
        self._closing_up: ClosingUp | None = None
        self._session = session
        self._first_generation = self._leader.generation
        self._groups: dict[str, int] = {}
        self._groups_lock = threading.Lock()
        self._serving = Serving(
            self._config,
            self._leader,
            self._records,
            run,
            check_lead=check_lead,
            out=self._out,
            ray=RayNodeJobs(self._config, coordinator=adapter.get_own_actor(), get_host_fields=self.get_host_fields),
            ip=self._ip,
            port=session.port,
            secret=session.secret,
            disk=self._disk,
            follows=lost_s is not None,
            on_failure=self._fail,
        )
        self._watch = RayWatch(
            get_living=partial(adapter.get_worker_nodes, self._config.cluster),
            get_draining=adapter.get_draining_nodes,
            nodes=self._serving.nodes,
            prices=KnownPrices(self._config.cost, say=self._out.say),
            post=self._serving.post,
        )
        self._hosts_told = threading.Event()
        """The hosts know of the end, and the serving thread writes nothing more."""
        self._start("serve", self._serve)
        self._start("watch", lambda: self._watch.run(lambda: self._closing))

    def _start(self, name: str, body: Callable[[], None]) -> None:
        threading.Thread(target=self._guard, args=(body,), name=name, daemon=True).start()

    # ---- the actor's interface

    def attach(self, driver: str, config: dict[str, Any]) -> str:
        """Let a driver lead this run: "ok", "busy" (another one does, alive) or "changed" (another configuration).

        Raises:
            StorageError: the run is led elsewhere: by another cluster, or without one.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._driver not in ("", driver) and self._get_driver_silence_s() < DRIVER_BUSY_S:
            return "busy"
        if config != self._config_fields:
            self._serving.post(Stop(reason="the run goes on with another configuration"))
            return "changed"
        self._driver, self._driver_heard_s = driver, self._clock.get_s()
        return "ok"

    def poll(self, driver: str) -> Update | None:
        """Return what is new since the last poll; None if another driver leads by now."""
        if driver != self._driver:
            return None
        self._driver_heard_s = self._clock.get_s()
        return self._out.take(self._records.summary())

    def look(self) -> Scene:
        """Return the run as it is now, without taking anything from what `poll` hands out."""
        return self._serving.look()

    def get_lost_nodes(self) -> frozenset[str]:
        """Return the nodes whose host has just gone: Ray sees the loss of a node many seconds after its peers do."""
        return self._serving.nodes.get_lost(now_s=time.monotonic())

    def enter_group(self, key: str) -> int:
        """Number Ray's worker groups in the order in which their first agent shows up, over all coordinators."""
        with self._groups_lock:
            return self._groups.setdefault(key, self._first_generation * _GROUPS_PER_GENERATION + len(self._groups))

    def get_session(self) -> Session:
        """Return what whoever follows this coordinator must have, for a driver that did not create it."""
        return replace(self._session, port=self._serving.hosts.port)

    def get_host_fields(self) -> dict[str, Any]:
        """Return what `start_host` needs beside the node's own facts."""
        address = CoordinatorAddress(generation=self._first_generation, host=self._ip, port=self._serving.hosts.port)
        return {
            "session": self._session.id,
            "coordinator_address": asdict(address),
            "secret": self._session.secret,
            "lease_s": self._config.fault.lease_s,
            "disk": self._disk,
            "config": self._config_fields,
        }

    def relay(self, lines: list[str]) -> None:
        """Pass on what an agent wants the driver to show: the log lines of its trainer."""
        for line in lines:
            self._out.say(line)

    def hear_watch(self, node: str, news: News) -> None:
        """Take what the watch of a node has learned from its provider."""
        self._serving.post(WatchTold(node=node, news=news))

    def is_over(self) -> bool:
        """Tell whether the run has ended, so that agents may return."""
        return self._out.done is not None

    def stop(self, reason: str) -> None:
        """Park the trainers behind a checkpoint and end the run, resumable."""
        self._serving.post(Stop(reason=reason))

    def close(self) -> None:
        """Begin to end all hosts and to bring the last rows to the storage; `get_closing` tells how far that is."""
        with self._close_lock:
            if self._closing_up is not None:
                return
            self._closing_up = ClosingUp(self._run, records=self._records, writer=self._writer, say=self._out.say)
        self._closing = True
        self._serving.hosts.wake()
        threading.Thread(target=self._close_up, args=(self._closing_up,), name="close", daemon=True).start()

    def get_closing(self) -> Closing:
        """Return how far the closing is; the caller kills the actor once it is over."""
        assert self._closing_up is not None, "nobody has asked it to close"
        return self._closing_up.get_state()

    def _close_up(self, closing_up: ClosingUp) -> None:
        self._hosts_told.wait(HOST_SILENT_S)  # or they would look for another coordinator
        done = self._out.done
        patience_s = FAILED_PATIENCE_S if done is not None and done.kind == "failed" else CLOSE_PATIENCE_S
        self._serving.rows.wait(patience_s)
        closing_up.bring_rows(patience_s)
        self._leader.close()
        closing_up.end(self._opened)

    # ---- the serving thread

    def _serve(self) -> None:
        self._serve_thread = threading.current_thread()
        while not self._closing:
            self._leader.check_known()
            self._serving.turn()
            self._end_if_orphaned()
        done = self._out.done
        if self._has_failed:
            self._end_hosts("the run failed")
        else:
            self._end_hosts("the run is over", forget=done is not None and done.kind == "finished")

    def _get_driver_silence_s(self) -> float:
        return self._clock.get_s() - self._driver_heard_s

    def _end_if_orphaned(self) -> None:
        """Without a driver nobody would ever release the nodes: save, then go."""
        if self._get_driver_silence_s() < self._config.fault.lease_s / 2:
            return
        if self._out.done is None:
            self._serving.decide(Stop(reason=DRIVER_GONE))
            return
        self._end_hosts(DRIVER_GONE)
        self.close()
        assert self._closing_up is not None
        self._closing_up.wait(2 * CLOSE_PATIENCE_S)
        os._exit(0)

    def _end_hosts(self, reason: str, *, forget: bool = False) -> None:
        """End all hosts; see `Hosts.end_all`."""
        self._serving.hosts.end_all(reason, forget=forget)
        self._hosts_told.set()

    # ---- any thread

    def _exit_without_driver(self) -> None:
        """End the actor once nobody asks it any more: one that is detached outlives its cluster's last job."""
        while self._get_driver_silence_s() < self._config.fault.lease_s / 2:
            time.sleep(WATCH_EVERY_S)
        os._exit(0)

    def _guard(self, body: Callable[[], None]) -> None:
        """End the run if a thread fails on the user's storage or prices, and the actor if it fails otherwise.

        A half-dead coordinator would keep paid nodes waiting; hosts and driver see the end of a dead one.
        """
        try:
            body()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """See `_guard`; from any thread."""
        if not isinstance(error, SolventError):
            traceback.print_exception(error)
            os._exit(1)
        self._out.end(Done(kind="failed", reason=str(error), exit_code=error.exit_code))
        self._has_failed = self._closing = True
        if threading.current_thread() is self._serve_thread:
            self._end_hosts("the run failed")
        else:  # that one sees it, and ends the hosts
            self._serving.hosts.wake()
        threading.Thread(target=self._exit_without_driver, name="failed", daemon=True).start()


def _get_disk(config: RunConfig, leader: Leadership) -> str:
    """Return the folder of this run on the nodes' own disks; empty if it has none."""
    if not config.checkpoint.node_disk:
        return ""
    return f"{config.checkpoint.node_disk}/solvent-{config.run}-{leader.get_life()}"
