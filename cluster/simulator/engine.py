"""One run along one fleet: events in, the controller's actions carried out in a fake clock, every second in the ledger.

`cluster.controller.decide` is the one that decides in a real run, and the ledger is the real one. Made up are only
the times: what a change of the world takes, how fast a world of some size works (in proportion to its nodes), and
what saves cost.
"""

import heapq
from collections import deque

from cluster import controller
from cluster.controller.state import MEMBER_PHASES
from cluster.controller.worlds import get_leave_s, get_usual_outage_s
from cluster.ledger import Ledger
from cluster.simulator.setup import Setup, Tally
from cluster.simulator.work import Work
from cluster.traces import Fleet
from cluster.types import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Draining,
    Event,
    GenerationTaken,
    Go,
    HostGone,
    Join,
    Kill,
    Leave,
    Park,
    Slot,
    Stepped,
    TakeGeneration,
    Tick,
    TrainerEnded,
    TrainerReady,
)
from elastic.ports import Phase, Progress

_FLUSH_EVERY = 300
_SLOT = "gpu0"


_Due = Event | str | tuple[str, ...]
"""What happens at a time: an event of the controller's, something of ours, or nodes that come."""


class Simulation:
    """One run; `run` plays all of it."""

    def __init__(self, fleet: Fleet, setup: Setup) -> None:
        self._fleet, self._setup = fleet, setup
        self._state = controller.State(
            policy=controller.Policy(
                world_sizes=setup.world_sizes,
                max_failures_without_progress=10**9,
                growth_patience=setup.growth_patience,
                first_outage_s=setup.saving.get_outage_s(),
                park_s=1e9,
                form_s=1e9,
                leave_s=1e9,
            )
        )
        self._ledger = Ledger()
        self._tally = Tally()
        self._work = Work(setup, self._ledger, self._tally)
        self._due: list[tuple[float, int, _Due, int]] = []
        self._count = 0
        self._todo: deque[Event] = deque()
        self._now_s = 0.0
        self._started_s = 0.0
        self._is_loss = False
        self._there: set[str] = set()
        self._parked = self._left = 0
        self._removed = {change.time_s: set(change.removed) for change in fleet.changes}
        self._ticks: set[float] = set()
        self._flushed = 0
        self._is_recorded = True
        self._phases: dict[str, Phase] = {}

    def run(self) -> Tally:
        """Play the whole fleet."""
        for change in self._fleet.changes:
            for node in change.removed:
                if self._setup.notice_s:
                    deadline_s = change.time_s
                    notice = Draining(node=node, deadline_s=deadline_s, reason="simulated", source="simulator")
                    self._at(max(0.0, deadline_s - self._setup.notice_s), notice)
                self._at(change.time_s, HostGone(node=node, reason="simulated"))
            if change.added:
                self._at(change.time_s, change.added)
        while self._due and self._tally.finished_s is None:
            time_s, _, what, attempt = heapq.heappop(self._due)
            if time_s > self._fleet.end_s:
                break
            self._now_s = time_s
            self._take(what, attempt)
            if not self._is_recorded:  # stages that it went through at once left no time
                self._record_stage()
            self._plan_tick()
            if self._count - self._flushed > _FLUSH_EVERY:  # accounts that are long are slow
                self._flushed = self._count
                self._tally.rows += self._ledger.flush(self._work.since_s or self._now_s)
        return self._close()

    # ---- time

    def _at(self, time_s: float, what: "_Due", attempt: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._due, (time_s, self._count, what, attempt))

    def _plan_tick(self) -> None:
        """Have the controller asked again when a running world may grow, or must heed a notice."""
        state = self._state
        times_s = [state.gather_until_s]
        if state.stage == "running":
            times_s.append(get_leave_s(state))
        if state.stage == "running" and state.first_step_s is not None and len(state.claims) > len(state.members):
            times_s.append(state.first_step_s + state.policy.growth_patience * get_usual_outage_s(state))
        for at_s in times_s:
            if self._now_s < at_s < self._fleet.end_s and at_s not in self._ticks:
                self._ticks.add(at_s)
                self._at(at_s, Tick())

    def _take(self, what: "_Due", attempt: int) -> None:
        if isinstance(what, str):
            self._take_own(what, attempt)
            return
        if isinstance(what, tuple):
            self._take_nodes(what, is_ready=bool(attempt))
            return
        if isinstance(what, HostGone | Draining) and what.node not in self._there:
            return
        if isinstance(what, HostGone):
            self._there.discard(what.node)
        self._decide(what)
        if isinstance(what, HostGone):
            self._ledger.leave(what.node, self._now_s)

    def _take_nodes(self, nodes: tuple[str, ...], *, is_ready: bool) -> None:
        """Pay for nodes from now on; once they are ready they claim their slots together."""
        if not is_ready:
            for node in nodes:
                self._there.add(node)
                self._ledger.join(node, self._now_s, gpus=1, usd_per_gpu_hour=self._setup.usd_per_node_hour)
            self._at(self._now_s + self._setup.start_s, nodes, 1)
            return
        here = [node for node in nodes if node in self._there]
        group = self._state.group + 1
        for node in here:
            self._ledger.switch(node, "wait", self._now_s)
            self._phases[node] = "wait"
            self._decide(Claimed(slot=Slot(node, _SLOT), group=group, group_size=len(here)))

    def _take_own(self, what: str, attempt: int) -> None:
        """Take what is no event of the controller's."""
        state = self._state
        match what:
            case "step" if attempt == state.attempt and state.stage == "running":
                self._work.begin(self._now_s)
                self._decide(Stepped(attempt=attempt, progress=self._get_progress()))
                end_s = self._work.estimate_end_s(self._now_s, len(state.members))
                if end_s < self._fleet.end_s:
                    self._at(end_s, "done", attempt)
            case "parked" | "left" if attempt == state.attempt:
                outcome = "interrupted" if what == "parked" else "lost"
                for slot in list(state.alive):
                    self._decide(TrainerEnded(slot=slot, attempt=attempt, outcome=outcome, reason="simulated"))
            case "done" if attempt == state.attempt and self._work.since_s is not None:
                self._stop_training(is_loss=False)
                self._tally.finished_s = self._now_s
            case _:
                pass

    # ---- the controller

    def _decide(self, event: Event) -> None:
        self._todo.append(event)
        while self._todo:
            taken = self._todo.popleft()
            before = self._state.stage
            if (
                isinstance(taken, HostGone)
                and self._work.since_s is not None
                and taken.node in self._state.member_nodes
            ):
                self._is_loss = True
            actions = controller.decide(self._state, taken, now_s=self._now_s)
            if before == "running" and self._state.stage in ("clearing", "waiting", "forming"):
                self._stop_training(is_loss=self._is_loss)
            for action in actions:
                self._carry_out(action)
            self._is_recorded &= self._state.stage == before

    def _carry_out(self, action: Action) -> None:  # noqa: PLR0912 (a branch per action)
        state = self._state
        match action:
            case TakeGeneration():
                self._todo.append(GenerationTaken(attempt=action.attempt))
            case Join():
                ready = TrainerReady(slot=action.slot, attempt=action.attempt, store_host="h", store_port=1)
                self._todo.append(ready)
            case Go() if action.rank == 0:
                saving = self._setup.saving
                outage_s = saving.recovery_s if saving.planned_s is None else saving.planned_s
                if self._is_loss:
                    outage_s = saving.get_outage_s()
                self._is_loss = False
                self._at(self._now_s + outage_s, "step", action.attempt)
            case Park():
                if self._parked != action.attempt:
                    self._parked = action.attempt
                    self._stop_training(is_loss=False)
                    self._at(self._now_s + self._setup.saving.park_s, "parked", action.attempt)
            case Leave() | Kill():
                if self._left != action.attempt:
                    self._left = action.attempt
                    self._at(self._now_s + self._setup.saving.leave_s, "left", action.attempt)
            case AttemptStarted():
                self._started_s = self._now_s
                self._tally.changes += 1
                self._tally.sizes.append((self._now_s, len(action.members)))
            case AttemptEnded():
                lived_s = self._now_s - self._started_s
                self._work.rhythm.observed(lived_s)
                self._tally.member_node_s += lived_s * len(action.members)
                self._tally.world_s += lived_s
                if action.kind == "lost":
                    self._tally.losses += 1
                    self._work.rhythm.lost()
                if not controller.get_usable(state):
                    self._tally.sizes.append((self._now_s, 0))
            case Done() | Go() | _:
                pass

    # ---- work

    def _stop_training(self, *, is_loss: bool) -> None:
        lost = self._removed.get(self._now_s, set()) if is_loss else None
        self._work.stop(self._now_s, self._state.member_nodes, lost=lost)

    def _get_progress(self) -> Progress:
        step = int(self._work.done / self._setup.step_node_s) + 1
        return Progress(step=step, tokens=step)

    def _record_stage(self) -> None:
        """Switch the accounts as a real run's records do (`RunRecords.staged`)."""
        self._is_recorded = True
        state = self._state
        phase = MEMBER_PHASES[state.stage]
        members = {slot.node for slot in state.members}
        for slot in state.claims:
            now: Phase = phase if slot.node in members else "wait"
            if self._phases.get(slot.node) != now and self._ledger.is_open(slot.node):
                self._phases[slot.node] = now
                self._ledger.switch(slot.node, now, self._now_s)

    def _close(self) -> Tally:
        tally, end_s = self._tally, self._tally.finished_s or self._fleet.end_s
        self._now_s = end_s
        if self._state.stage == "running":
            self._stop_training(is_loss=False)
        if self._state.stage in ("forming", "running", "parking", "clearing"):
            tally.member_node_s += (end_s - self._started_s) * len(self._state.members)
            tally.world_s += end_s - self._started_s
        for node in self._ledger.get_open():
            self._ledger.leave(node, end_s)
        tally.rows += self._ledger.flush(end_s)
        totals = self._ledger.totals()
        tally.useful_node_s, tally.usd, tally.end_s = self._work.done, totals.usd, end_s
        tally.paid_node_s = totals.paid_gpu_s
        return tally


def simulate(fleet: Fleet, setup: Setup) -> Tally:
    """Play a run along a fleet."""
    return Simulation(fleet, setup).run()
