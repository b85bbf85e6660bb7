"""The one thread that decides: it hears hosts and events, feeds `controller.decide` and carries out its actions.

Nothing here waits for a storage, for Ray or for another thread. What must is a job whose end is an event.
"""

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cluster import controller
from cluster.runtime import messages as said
from cluster.runtime.coordinator.background import Background
from cluster.runtime.coordinator.descriptors import raise_limit
from cluster.runtime.coordinator.events import GenerationGiven, InboxEvent, NodeEvent, Tell
from cluster.runtime.coordinator.memory_tier import plan_memory_tier
from cluster.runtime.coordinator.nodes.fleet import Fleet, RayJobs
from cluster.runtime.coordinator.nodes.hosts import Hosts
from cluster.runtime.coordinator.nodes.hosts import News as HostNews
from cluster.runtime.coordinator.nodes.node_records import Nodes
from cluster.runtime.coordinator.published import Published
from cluster.runtime.coordinator.records.budget_keeper import BudgetKeeper
from cluster.runtime.coordinator.records.relayed import RowReceiver
from cluster.runtime.coordinator.records.run_records import RunRecords
from cluster.runtime.coordinator.world import World
from cluster.types import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Event,
    GenerationTaken,
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
    Stop,
    TakeBack,
    TakeGeneration,
    Tick,
    get_leave_limit_s,
)
from elastic.config import RunConfig
from elastic.records.leader import Leadership
from elastic.records.spool import OpenRun

_RENEW_EVERY_S = 1.0
_PUBLISH_EVERY_S = 0.25
_TURN_S = 0.2
_RETURN_S = 3.0
"""Hosts that live come by themselves to who follows their coordinator; only after this are others started."""


class Serving:
    """See the module. `turn` is called by one thread, over and over; `post`, `look` and what `Nodes` has by any.

    Args:
        run: where the rows of trainers go.
        check_lead: raises if another one leads the run by now.
        out: what the driver is told.
        ray: what is asked of Ray for nodes.
        port: where hosts look for us, unless it is taken; 0: any.
        secret: what a host must know.
        disk: the folder of the run on the nodes' own disks; empty if it has none.
        follows: living hosts of a coordinator before may come.
        on_failure: takes what a job raised, on its thread.
    """

    def __init__(
        self,
        config: RunConfig,
        leader: Leadership,
        records: RunRecords,
        run: OpenRun,
        *,
        check_lead: Callable[[], None],
        out: Published,
        ray: RayJobs,
        ip: str,
        port: int,
        secret: str,
        disk: str,
        follows: bool,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._config, self._leader, self._records, self._out = config, leader, records, out
        self._inbox: queue.SimpleQueue[InboxEvent] = queue.SimpleQueue()
        self._state = _begin(config, leader, records)
        self._budget = BudgetKeeper(config, records)
        self.nodes = Nodes()
        self.hosts = Hosts(
            ip,
            self.nodes,
            port=port,
            secret=secret,
            on_ready=self._take_host,
            on_message=self._hear,
            on_gone=self._lose_host,
            say=out.say,
        )

        def tell(node: str, message: said.CoordinatorMessage) -> None:
            self.post(Tell(node=node, message=message))

        rows = RowReceiver(run, check_lead=check_lead, answer=tell, on_failure=on_failure)
        self.rows = rows
        disks = "own" if disk else "shared"
        self._world = World(self._state, records=records, out=out, rows=rows, disks=disks, decide=self.decide)
        self._fleet = Fleet(
            self.nodes,
            ray,
            records,
            watches=config.cluster.notices != "off",
            start_every_s=config.fault.lease_s / 6,  # one that has lost its coordinator looks for the next for a half
            start_from_s=time.time() + (_RETURN_S if follows else 0.0),
            most_files=raise_limit(),
            say=out.say,
            post=self.post,
            decide=self.decide,
            on_failure=on_failure,
        )
        self._generations = Background("generations", on_failure=on_failure)
        self._told_memory_of = 0
        """The attempt whose hosts were told last."""
        self._agents: dict[Slot, int] = {}
        self._renew_s = self._publish_s = 0.0

    # ---- for any thread

    def post(self, event: InboxEvent) -> None:
        """Have an event taken on the serving thread."""
        self._inbox.put(event)
        self.hosts.wake()

    def look(self) -> Scene:
        """Return the run as it is now."""
        state = self._state
        return Scene(
            stage=state.stage,
            attempt=state.attempt,
            step=self._records.history.step,
            attempt_step=self._world.step,
            world_size=len(state.members),
            workers=tuple(self._world.get_workers()),
            agents=dict(self._agents),
            hosts=self.nodes.get_pids(),
        )

    # ---- the serving thread

    def turn(self) -> None:
        """Take what has come, or comes within a moment."""
        self.hosts.serve(timeout_s=_TURN_S)
        while not self._inbox.empty():
            self._take(self._inbox.get())
        self.decide(Tick())
        now_s = time.monotonic()
        if now_s >= self._renew_s:
            self._renew_s = now_s + _RENEW_EVERY_S
            self.hosts.renew_leases()  # only while this lives, and so its driver: nobody else would form a group
        self._records.flush(time.time())
        if now_s >= self._publish_s:
            self._publish_s = now_s + _PUBLISH_EVERY_S
            self._records.publish()
            self._heed_budget()

    def _heed_budget(self) -> None:
        """Warn of a limit that comes near; save and leave before it is passed, or be killed by then."""
        state = self._state
        if state.stop is not None or state.stage == "done":
            return
        verdict = self._budget.look(time.time(), slowest_park_s=state.slowest_park_s)
        if verdict.warning:
            self._out.say(f"budget: {verdict.warning}")
        if verdict.leave:
            limit_s = self._budget.get_leave_s(state.slowest_park_s)
            state.policy = replace(state.policy, park_s=min(state.policy.park_s, limit_s))
            self.decide(Stop(reason=verdict.leave))

    def decide(self, event: Event) -> None:
        """Have the controller take an event, and do what it wants."""
        now_s = time.time()
        before = self._state.stage
        for action in controller.decide(self._state, event, now_s=now_s):
            self._carry_out(action, now_s)
        if self._state.stage != before:
            self._records.staged(self._state, now_s)
            self._records.publish()
            self._publish_stage()

    def _take(self, event: InboxEvent) -> None:
        if isinstance(event, NodeEvent):
            self._fleet.take(event, in_use=self._state.member_nodes if self._world.is_safe() else None)
        elif isinstance(event, Tell):
            self.hosts.tell(event.node, event.message)
        elif isinstance(event, GenerationGiven):
            self._records.record_inherited(event.inherited, time.time())
            self.decide(GenerationTaken(attempt=event.attempt))
        else:
            self.decide(event)

    def _take_host(self, node: str) -> None:
        self._records.host_ready(node, time.time())
        self._out.say(f"node {node[:8]} is warm")

    def _lose_host(self, node: str, reason: str) -> None:
        self._records.host_gone(node, time.time())
        self.decide(HostGone(node=node, reason=reason))

    def _hear(self, message: HostNews) -> None:
        """Take what a host says."""
        if isinstance(message, said.TrainerSaid):
            self._world.hear(message.slot, message.attempt, message.message)
            return
        if isinstance(message, Claimed):
            self._agents[message.slot] = message.agent_pid
        self.decide(message)

    def _publish_stage(self) -> None:
        state = self._state
        self._out.enter(
            state.stage, state.attempt, self._world.get_workers() if state.stage in ("running", "parking") else ()
        )
        if state.stage == "waiting":
            usable, least = len(controller.get_usable(state)), state.policy.world_sizes[0]
            self._out.say(f"waiting for nodes: {usable} of at least {least} worker(s)")

    # ---- actions

    def _carry_out(self, action: Action, now_s: float) -> None:
        match action:
            case Join() | Go() | Park() | Leave() | Kill():
                if isinstance(action, Go):
                    self._tell_memory_tier(action.attempt)
                self.hosts.tell(action.slot.node, action)
            case TakeGeneration():
                self._generations.submit(partial(self._take_generation, action.attempt))
            case AttemptStarted():
                self._world.begin()
                self._records.attempt_started(action, now_s)
                nodes = ", ".join(sorted({slot.node[:8] for slot in action.members}))
                self._out.say(f"attempt {action.attempt}: {len(action.members)} worker(s) on {nodes}")
            case AttemptEnded():
                self._records.attempt_ended(action, now_s)
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
                self._fleet.give_up(action.node, action.reason)
            case Done():
                self._out.end(action)

    def _tell_memory_tier(self, attempt: int) -> None:
        """Tell the hosts of an attempt what its trainers must know of it, once for all of them."""
        if self._told_memory_of == attempt:
            return
        self._told_memory_of = attempt
        members = self._state.member_nodes
        tier = plan_memory_tier(self.nodes, members, has_copies=self._config.checkpoint.memory == "peer")
        mean_s = self._records.estimate_mean_s_between_losses(3600 * self._config.fault.mean_hours_between_losses)
        for node in members:
            told = said.ReplicaServersTold(
                attempt=attempt,
                replica_servers=tier.replica_servers,
                peer=tier.get_peer(node),
                mean_s_between_losses=mean_s,
            )
            self.hosts.tell(node, told)

    def _take_generation(self, attempt: int) -> None:
        """Take the right to write from all worlds before; the trainers of the last one are out of it. A job."""
        self._leader.take(attempt)
        self.post(GenerationGiven(attempt=attempt, inherited=self._records.fetch_inherited()))


def _begin(config: RunConfig, leader: Leadership, records: RunRecords) -> controller.State:
    policy = controller.Policy(
        world_sizes=config.get_world_sizes(),
        max_failures_without_progress=config.fault.max_failures_without_progress,
        max_node_failures=config.fault.max_node_failures,
        leave_s=get_leave_limit_s(uses_gpus=bool(config.cluster.gpus_per_worker)),
    )
    return controller.State(policy=policy, attempt=leader.generation - 1, failures=records.failures)


def _name(slot: Slot) -> str:
    return f"{slot.name} of node {slot.node[:8]}"
