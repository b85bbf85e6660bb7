"""The coordinator: the only authority on who trains. A detached 0-CPU Ray actor on the head node.

One thread serves the hosts over TCP, feeds `controller.decide` and carries out its actions; another asks Ray twice a
second which nodes live or drain, and starts a host on each new one. The actor's methods, called by the driver and
the agents, only post to the first thread or read what it published. It needs no torch.

What it cannot do without is on the storage: if it dies, the driver creates another one, to which the hosts that live
report. That one takes the next epoch, so the world that trained on meanwhile is over, and forms a world anew.
"""

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from cluster import controller
from cluster.node_watch import News
from cluster.runtime import messages as said
from cluster.runtime.coordinator.background import Background
from cluster.runtime.coordinator.books import open_books
from cluster.runtime.coordinator.closing import CLOSE_PATIENCE_S, FAILED_PATIENCE_S, Closing, ClosingUp
from cluster.runtime.coordinator.descriptors import describe_shortage, raise_limit
from cluster.runtime.coordinator.hosts import HOST_SILENT_S, Hosts, HostStarts
from cluster.runtime.coordinator.hosts import News as HostNews
from cluster.runtime.coordinator.node_watches import Watches
from cluster.runtime.coordinator.published import Published, Update
from cluster.runtime.coordinator.relayed import RowKeeper
from cluster.runtime.coordinator.row_writer import RowWriter
from cluster.runtime.coordinator.seat import Seat
from cluster.runtime.node.priority import take_priority_of
from cluster.runtime.node.start_host import start_host
from cluster.runtime.ray import adapter
from cluster.types import (
    DRIVER_GONE,
    Action,
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Draining,
    EpochTaken,
    Event,
    Expired,
    GiveUp,
    Go,
    HostGone,
    Join,
    Kill,
    Leave,
    LeaveOut,
    Park,
    Scene,
    Slot,
    Stalled,
    Stepped,
    Stop,
    TakeBack,
    TakeEpoch,
    Tick,
    TrainerEnded,
    TrainerReady,
    Undrained,
    Unkillable,
    Worker,
    get_leave_limit_s,
)
from elastic import config as configs
from elastic.awake import AwakeClock
from elastic.checkpoint.replicas.placement import NodeLabels, plan_peers
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.ports import Address
from elastic.records.attempts import next_attempt
from elastic.records.leader import Leadership, lead
from elastic.records.spool import open_run
from elastic.storage import is_url

WATCH_EVERY_S = 0.5
RENEW_EVERY_S = 1.0
_RETURN_S = 3.0
"""Hosts that live come by themselves to who follows their coordinator; only after this are others started."""
_GROUPS_PER_EPOCH = 1_000_000
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


@dataclass(frozen=True, kw_only=True)
class _Memories:
    """What the trainers of an attempt know of the memory tier."""

    attempt: int
    keepers: Mapping[str, Address]
    """Who serves what."""
    peers: Mapping[str, str]
    """Which node gets the copies of which."""
    mean_s_between_losses: float


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
        self._closing = False
        self._close_lock = threading.Lock()
        self._refusal: SolventError | None = None
        self._opened = ExitStack()
        try:
            run = self._opened.enter_context(open_run(self._config.storage, self._config.run))
            self._leader = lead(run.storage, who="solvent train", at_least=next_attempt(run.dir))
            run.lead(self._leader.check, epoch=self._leader.epoch)
            self._disk = _get_disk(self._config, self._leader)
        except SolventError as refusal:  # raised here, its text would not reach the driver
            self._refusal = refusal
            self._opened.close()
            threading.Thread(target=self._exit_without_driver, name="refused", daemon=True).start()
            return
        self._ip = adapter.get_own_ip()
        self._hosts = Hosts(
            self._ip,
            port=session.port,
            secret=session.secret,
            on_ready=self._take_host,
            on_message=self._hear,
            on_gone=self._lose_host,
            say=self._say,
        )
        self._out = Published()
        self._run = run
        # rows for an object store wait in a spool, and what leaves it is checked
        check_lead = self._leader.check_known if is_url(self._config.storage) else self._leader.check
        self._writer = RowWriter(check_lead=check_lead, on_failure=self._fail, say=self._out.say)
        self._books = open_books(
            str(run.dir.root),
            self._config,
            check_lead=check_lead,
            append=self._writer.append,
            say=self._out.say,
            lost_s=lost_s,
        )
        self._rows = RowKeeper(run, check_lead=check_lead, answer=self._hosts.tell, on_failure=self._fail)
        self._closing_up: ClosingUp | None = None
        self._state = controller.State(
            policy=controller.Policy(
                world_sizes=self._config.get_world_sizes(),
                max_failures_without_progress=self._config.fault.max_failures_without_progress,
                max_node_failures=self._config.fault.max_node_failures,
                leave_s=get_leave_limit_s(uses_gpus=bool(self._config.cluster.gpus_per_worker)),
            ),
            attempt=self._leader.epoch - 1,
            failures=self._books.failures,
        )
        self._session = session
        self._follows = lost_s is not None
        self._first_epoch = self._leader.epoch
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._watches = Watches(adapter.get_own_actor(), self._config)
        self._epochs = Background("epochs", on_failure=self._fail)
        self._drains = Background("drains", on_failure=self._fail)
        self._told_by_watch: set[str] = set()
        self._resumed_step = self._safe_step = 0
        self._labels: dict[str, NodeLabels] = {}
        self._memories: _Memories | None = None
        self._groups: dict[str, int] = {}
        self._pids: dict[Slot, int] = {}
        """Of the trainers of the current attempt that are ready."""
        self._agents: dict[Slot, int] = {}
        self._attempt_step = 0
        self._hosts_told = threading.Event()
        threading.Thread(target=self._guard, args=(self._serve,), name="serve", daemon=True).start()
        threading.Thread(target=self._guard, args=(self._watch_ray,), name="watch", daemon=True).start()

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
            self._post(Stop(reason="the run goes on with another configuration"))
            return "changed"
        self._driver, self._driver_heard_s = driver, self._clock.get_s()
        return "ok"

    def poll(self, driver: str) -> Update | None:
        """Return what is new since the last poll; None if another driver leads by now."""
        if driver != self._driver:
            return None
        self._driver_heard_s = self._clock.get_s()
        return self._out.take(self._books.summary())

    def look(self) -> Scene:
        """Return the run as it is now, without taking anything from what `poll` hands out."""
        state, pids = self._state, dict(self._pids)
        return Scene(
            stage=state.stage,
            attempt=state.attempt,
            step=self._books.history.step,
            attempt_step=self._attempt_step,
            world_size=len(state.members),
            workers=tuple(
                Worker(rank=rank, node=slot.node, slot=slot.name, pid=pids[slot])
                for rank, slot in enumerate(state.members)
                if slot in pids
            ),
            agents=dict(self._agents),
            hosts=self._hosts.get_pids(),
        )

    def get_lost_nodes(self) -> frozenset[str]:
        """Return the nodes whose host has just gone: Ray sees the loss of a node many seconds after its peers do."""
        return self._hosts.get_lost()

    def enter_group(self, key: str) -> int:
        """Number Ray's worker groups in the order in which their first agent shows up, over all coordinators."""
        return self._groups.setdefault(key, self._first_epoch * _GROUPS_PER_EPOCH + len(self._groups))

    def get_session(self) -> Session:
        """Return what whoever follows this coordinator must have, for a driver that did not create it."""
        return replace(self._session, port=self._hosts.port)

    def get_host_fields(self) -> dict[str, Any]:
        """Return what `start_host` needs beside the node's own facts."""
        seat = Seat(epoch=self._first_epoch, host=self._ip, port=self._hosts.port)
        return {
            "session": self._session.id,
            "seat": asdict(seat),
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
        self._watches.hear(node, news)
        for line in news.lines:
            self._out.say(f"node {node[:8]}: {line}")
        if departure := news.departure:
            self._told_by_watch.add(node)
            reason = f"{departure.provider}: {departure.reason}"
            self._post(Draining(node=node, deadline_s=departure.deadline_s, reason=reason, source=departure.provider))
        if news.stays:
            self._told_by_watch.discard(node)
            self._post(Undrained(node=node))

    def is_over(self) -> bool:
        """Tell whether the run has ended, so that agents may return."""
        return self._out.done is not None

    def stop(self, reason: str) -> None:
        """Park the trainers behind a checkpoint and end the run, resumable."""
        self._post(Stop(reason=reason))

    def close(self) -> None:
        """Begin to end all hosts and to bring the last rows to the storage; `get_closing` tells how far that is."""
        with self._close_lock:
            if self._closing_up is not None:
                return
            self._closing_up = ClosingUp(self._run, books=self._books, writer=self._writer, say=self._out.say)
        self._closing = True
        self._hosts.wake()
        threading.Thread(target=self._close_up, args=(self._closing_up,), name="close", daemon=True).start()

    def get_closing(self) -> Closing:
        """Return how far the closing is; the caller kills the actor once it is over."""
        assert self._closing_up is not None, "nobody has asked it to close"
        return self._closing_up.get_state()

    def _close_up(self, closing_up: ClosingUp) -> None:
        self._hosts_told.wait(HOST_SILENT_S)  # or they would look for another coordinator
        done = self._out.done
        patience_s = FAILED_PATIENCE_S if done is not None and done.kind == "failed" else CLOSE_PATIENCE_S
        self._rows.wait(patience_s)
        closing_up.bring_rows(patience_s)
        self._leader.close()
        closing_up.end(self._opened)

    # ---- the serving thread

    def _serve(self) -> None:
        next_renewal_s = 0.0
        while not self._closing:
            self._leader.check_known()
            self._hosts.serve(timeout_s=0.2)
            while not self._inbox.empty():
                self._decide(self._inbox.get())
            self._decide(Tick())
            if time.monotonic() >= next_renewal_s:
                next_renewal_s = time.monotonic() + RENEW_EVERY_S
                self._hosts.renew_leases()  # only while this lives, and so its driver: nobody else would form a group
            self._books.flush(time.time())
            self._end_if_orphaned()
        done = self._out.done
        self._end_hosts("the run is over", forget=done is not None and done.kind == "finished")

    def _get_driver_silence_s(self) -> float:
        return self._clock.get_s() - self._driver_heard_s

    def _end_if_orphaned(self) -> None:
        """Without a driver nobody would ever release the nodes: save, then go."""
        if self._get_driver_silence_s() < self._config.fault.lease_s / 2:
            return
        if self._out.done is None:
            self._decide(Stop(reason=DRIVER_GONE))
            return
        self._end_hosts(DRIVER_GONE)
        self.close()
        assert self._closing_up is not None
        self._closing_up.wait(2 * CLOSE_PATIENCE_S)
        os._exit(0)

    def _end_hosts(self, reason: str, *, forget: bool = False) -> None:
        """End all hosts; see `Hosts.end_all`."""
        self._hosts.end_all(reason, forget=forget)
        self._hosts_told.set()

    def _exit_without_driver(self) -> None:
        """End the actor once nobody asks it any more: one that is detached outlives its cluster's last job."""
        while self._get_driver_silence_s() < self._config.fault.lease_s / 2:
            time.sleep(WATCH_EVERY_S)
        os._exit(0)

    def _say(self, line: str) -> None:
        self._out.say(line)

    def _take_host(self, node: str) -> None:
        self._books.host_ready(node, time.time())
        self._out.say(f"node {node[:8]} is warm")

    def _lose_host(self, node: str, reason: str) -> None:
        self._books.host_gone(node, time.time())
        self._decide(HostGone(node=node, reason=reason))

    def _hear(self, node: str, message: HostNews) -> None:
        """Take what a host says."""
        slot = Slot(node, message.slot)
        match message:
            case said.TrainerSaid():
                self._hear_trainer(slot, message.attempt, message.message)
            case said.SlotClaimed():
                self._agents[slot] = message.pid
                self._decide(Claimed(slot=slot, group=message.group, group_size=message.group_size))
            case said.SlotExpired():
                self._decide(Expired(slot=slot))
            case said.TrainerLeft():
                end = TrainerEnded(
                    slot=slot,
                    attempt=message.attempt,
                    kind=message.outcome,
                    reason=message.reason,
                    exit_code=message.exit_code,
                )
                self._decide(end)
            case said.TrainerStuck():
                self._decide(Unkillable(slot=slot, attempt=message.attempt, reason=message.reason))

    def _hear_trainer(self, slot: Slot, attempt: int | None, message: said.TrainerMessage) -> None:  # noqa: PLR0912 (a case per message)
        """Take what a trainer of the current attempt says; an older one has nothing to say any more."""
        # of a coordinator before this one, or of a world that is over
        if attempt is None or attempt != self._state.attempt or slot not in self._state.ranks:
            return
        now_s = time.time()
        match message:
            case said.Ready(store_host=host, store_port=port):
                self._pids[slot] = message.pid
                self._decide(TrainerReady(slot=slot, attempt=attempt, store_host=host, store_port=port))
            case said.Stepped(progress=progress):
                if slot == self._state.members[0]:
                    self._attempt_step = progress.step
                    self._out.add_row(dict(message.row))
                self._books.stepped(slot, progress, message.phases, now_s)
                self._decide(Stepped(attempt=attempt, progress=progress))
            case said.Progressed(times=times):
                for each in times:
                    self._books.step_times(slot, each.step, each.phases)
            case said.Restored(progress=progress, source=source):
                self._resumed_step = progress.step
                # from a disk of the nodes' own it is not safe: the next ones may not have it
                if source == "remote" or (source == "disk" and not self._disk):
                    self._safe_step = max(self._safe_step, progress.step)
                self._books.restored(slot, progress, source, now_s)
            case said.Phases(phases=phases):
                self._books.phases(slot, phases)
            case said.Kept(progress=progress, copied=copied):
                self._safe_step = max(self._safe_step, progress.step if copied else 0)
            case said.Stalled(where=where):
                if slot not in self._state.stalls.by_slot:
                    rank = self._state.ranks[slot]
                    how = "frozen" if where == "silent" else where
                    self._out.say(f"rank {rank} makes no progress for {message.waited_s:.0f} s: {how}")
                self._decide(Stalled(slot=slot, attempt=attempt, step=message.step, where=where))
            case said.Committed(progress=progress):
                self._safe_step = max(self._safe_step, progress.step)
                self._out.say(f"checkpoint of step {progress.step} committed")
            case said.RowWritten() | said.RowsAsked():
                self._rows.take(slot, attempt, message)

    def _decide(self, event: Event) -> None:
        now_s = time.time()
        before = self._state.stage
        for action in controller.decide(self._state, event, now_s=now_s):
            self._carry_out(action, now_s)
        if self._state.stage != before:
            self._books.staged(self._state, now_s)
            self._publish_stage()

    def _publish_stage(self) -> None:
        state = self._state
        at_work = state.members if state.stage in ("running", "parking") else ()
        workers = [
            Worker(rank=rank, node=slot.node, slot=slot.name, pid=self._pids[slot]) for rank, slot in enumerate(at_work)
        ]
        self._out.enter(state.stage, state.attempt, workers)
        if state.stage == "waiting":
            usable, least = len(controller.get_usable(state)), state.policy.world_sizes[0]
            self._out.say(f"waiting for nodes: {usable} of at least {least} worker(s)")

    def _carry_out(self, action: Action, now_s: float) -> None:
        match action:
            case Join() | Go() | Park() | Leave() | Kill():
                self._hosts.tell(action.slot.node, self._to_order(action))
            case TakeEpoch():
                self._epochs.submit(partial(self._take_epoch, action.attempt))
            case AttemptStarted():
                self._pids, self._attempt_step = {}, 0
                self._books.attempt_started(action, now_s)
                nodes = ", ".join(sorted({slot.node[:8] for slot in action.members}))
                self._out.say(f"attempt {action.attempt}: {len(action.members)} worker(s) on {nodes}")
            case AttemptEnded():
                self._books.attempt_ended(action, now_s)
                where = f" (node {action.cause[:8]})" if action.cause else ""
                self._out.say(f"attempt {action.attempt} {action.kind}: {action.reason}{where}")
                if action.denied:
                    self._out.say(f"node {action.denied[:8]} is left out: its trainers ended too many worlds in a row")
            case LeaveOut():
                self._out.say(f"{_name(action.slot)} is left out until its process ends: {action.reason}")
            case TakeBack():
                self._out.say(f"{_name(action.slot)} may train again: its process ended after {action.after_s:.0f} s")
            case GiveUp():
                self._out.say(f"node {action.node[:8]} is given up and drained: {action.reason}")
                self._told_by_watch.add(action.node)  # Ray would say "preemption notice"
                self._drains.submit(partial(self._drain, action.node, action.reason))
            case Done():
                self._out.end(action)

    def _to_order(self, action: Join | Go | Park | Leave | Kill) -> said.CoordinatorMessage:
        fields: dict[str, Any] = {**vars(action), "slot": action.slot.name}
        match action:
            case Go():
                return self._to_go(action)
            case Join():
                return said.Join(**fields)
            case Park():
                return said.Park(**fields)
            case Leave():
                return said.Leave(**fields)
            case Kill():
                return said.Kill(**fields)

    def _take_epoch(self, attempt: int) -> None:
        """Take the right to write from all worlds before; the trainers of the last one are out of it."""
        self._leader.take(attempt)
        self._books.close_inherited(time.time())
        self._post(EpochTaken(attempt=attempt))

    def _drain(self, node: str, reason: str) -> None:
        """Have Ray place nothing on a node any more, and an autoscaler replace it."""
        try:
            adapter.drain_node(node, reason=reason, deadline_s=None)
        except SolventError as error:
            self._out.say(f"node {node[:8]} could not be drained: {error}")
        else:
            self._post(Draining(node=node, deadline_s=None, reason=reason))

    def _find_memories(self, attempt: int) -> "_Memories":
        """Return what the trainers of an attempt must know of the memory tier; found once for all of them."""
        if self._memories is None or self._memories.attempt != attempt:
            keepers = self._hosts.get_keepers()
            members = self._state.member_nodes & keepers.keys()
            labels = {node: self._labels.get(node, NodeLabels()) for node in members}
            assumed_s = 3600 * self._config.fault.mean_hours_between_losses
            self._memories = _Memories(
                attempt=attempt,
                keepers=keepers,
                peers=plan_peers(labels) if self._config.checkpoint.memory == "peer" else {},
                mean_s_between_losses=self._books.estimate_mean_s_between_losses(assumed_s),
            )
            for node in self._state.member_nodes:
                self._hosts.tell(node, said.KeepersTold(attempt=attempt, keepers=keepers))
        return self._memories

    def _to_go(self, action: Go) -> said.Go:
        memories = self._find_memories(action.attempt)
        peer = memories.peers.get(action.slot.node)
        fields: dict[str, Any] = {**vars(action), "slot": action.slot.name}
        return said.Go(
            **fields,
            keepers={},
            peer=memories.keepers[peer] if peer else None,
            mean_s_between_losses=memories.mean_s_between_losses,
        )

    # ---- the watching thread

    def _watch_ray(self) -> None:
        """Follow Ray's view of the nodes: pre-warm and watch new ones, announce draining ones, book dead ones."""
        starts = HostStarts(
            lambda node: adapter.NodeTask(node, start_host, node, self.get_host_fields()),
            every_s=self._config.fault.lease_s / 6,  # one that has lost its coordinator looks for the next for a half
            say=self._out.say,
        )
        announced: dict[str, float | None] = {}
        most_files, is_short = raise_limit(), False
        start_from_s = time.time() + (_RETURN_S if self._follows else 0.0)
        while not self._closing:
            now_s = time.time()
            nodes = {node.id: node for node in adapter.get_worker_nodes(self._config.cluster)}
            if not is_short and (shortage := describe_shortage(most_files, len(nodes))):
                is_short = True
                self._out.say(shortage)
            self._books.follow_nodes(nodes, now_s)
            self._labels = {node.id: NodeLabels(zone=node.zone, capacity=node.capacity) for node in nodes.values()}
            if now_s >= start_from_s:
                starts.follow(nodes.keys(), self._hosts.get_pids().keys(), now_s=now_s)
            draining = {node: deadline_s for node, deadline_s in adapter.get_draining_nodes().items() if node in nodes}
            for node_id, deadline_s in draining.items():
                if node_id in self._told_by_watch:  # it knows the reason, and the deadline before Ray does
                    continue
                if node_id not in announced or announced[node_id] != deadline_s:
                    announced[node_id] = deadline_s
                    self._post(Draining(node=node_id, deadline_s=deadline_s, reason="preemption notice"))
            self._watches.follow(nodes.keys(), clear=self._find_clear(draining.keys()))
            time.sleep(WATCH_EVERY_S)

    def _find_clear(self, leaving: Set[str]) -> set[str]:
        """Return which nodes that leave are not needed any more.

        Others have trained on without them, from a state that is on the storage by now, or in memories of their own.
        """
        state = self._state  # written by the serving thread; each field is read once, and read again in half a second
        members, is_safe = state.members, state.stage == "running" and state.progressed
        if not is_safe or self._safe_step < self._resumed_step:
            return set()
        return set(leaving) - {slot.node for slot in members}

    def _post(self, event: Event) -> None:
        self._inbox.put(event)
        self._hosts.wake()

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
        self._end_hosts("the run failed")
        self._closing = True
        threading.Thread(target=self._exit_without_driver, name="failed", daemon=True).start()


def _get_disk(config: RunConfig, leader: Leadership) -> str:
    """Return the folder of this run on the nodes' own disks; empty if it has none."""
    if not config.checkpoint.node_disk:
        return ""
    return f"{config.checkpoint.node_disk}/solvent-{config.run}-{leader.get_life()}"


def _name(slot: Slot) -> str:
    return f"{slot.name} of node {slot.node[:8]}"
