"""One run along one fleet: events in, the controller's actions carried out in a fake clock, every second in the ledger.

`cluster.controller.decide` is the one that decides in a real run, and the ledger is the real one. Made up are only
the times: what a change of the world takes, how fast a world of some size works (in proportion to its nodes), and
what saves cost.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster import controller
from cluster.controller.worlds import get_leave_s, get_usual_outage_s
from cluster.ledger import Ledger, LedgerRow
from cluster.simulator.saving import Rhythm, Saving
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

_PARK_S = 2.0
"""A world that is asked to leaves after so long. Measured on two H200: 1 to 2 s (cluster/README.md)."""
_LEAVE_S = 0.5
"""Survivors of a loss are out of their world after so long; those that go together go within it."""
_FLUSH_EVERY = 300
_SLOT = "gpu0"


_Due = Event | str | tuple[str, ...]
"""What happens at a time: an event of the controller's, something of ours, or nodes that come."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated."""

    saving: Saving
    world_sizes: tuple[int, ...]
    usd_per_node_hour: float = 1.0
    step_node_s: float = 60.0
    """Node-seconds of work in a step: on 16 nodes it takes 3.75 s."""
    notice_s: float = 0.0
    """Before each loss; 0: none."""
    growth_patience: float = 5.0
    start_s: float = 0.0
    """Until a new node can train."""
    work_node_s: float = float("inf")
    """The run is finished after so much."""


@dataclass(kw_only=True)
class Tally:
    """What came of it."""

    useful_node_s: float = 0.0
    """Work that lasts."""
    redone_node_s: float = 0.0
    member_node_s: float = 0.0
    """Of nodes while they were in a world, or between two."""
    paid_node_s: float = 0.0
    world_s: float = 0.0
    """Time in which there was a world."""
    training_s: float = 0.0
    """Time in which there was a world that trained."""
    losses: int = 0
    changes: int = 0
    usd: float = 0.0
    end_s: float = 0.0
    finished_s: float | None = None
    rows: list[LedgerRow] = field(default_factory=list[LedgerRow])
    sizes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """World sizes over time; 0: none."""
    work: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Lasting work over time, in node-seconds."""


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
        self._rhythm = Rhythm(saving=setup.saving)
        self._tally = Tally()
        self._due: list[tuple[float, int, _Due, int]] = []
        self._count = 0
        self._todo: deque[Event] = deque()
        self._now_s = 0.0
        self._work = self._best = self._durable = 0.0
        """Node-seconds: where the current world is, the furthest that any was, what the storage has at least."""
        self._since_s: float | None = None
        """When the current world began to train; None: it does not yet."""
        self._started_s = 0.0
        self._is_loss = False
        self._there: set[str] = set()
        self._parked = self._left = 0
        self._removed = {change.time_s: set(change.removed) for change in fleet.changes}
        self._ticks: set[float] = set()
        self._flushed = 0

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
            self._plan_tick()
            if self._count - self._flushed > _FLUSH_EVERY:  # accounts that are long are slow
                self._flushed = self._count
                self._tally.rows += self._ledger.flush(self._since_s or self._now_s)
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
            self._decide(Claimed(slot=Slot(node, _SLOT), group=group, group_size=len(here)))

    def _take_own(self, what: str, attempt: int) -> None:
        """Take what is no event of the controller's."""
        state = self._state
        match what:
            case "step" if attempt == state.attempt and state.stage == "running":
                self._begin_training()
                self._decide(Stepped(attempt=attempt, progress=self._get_progress()))
                self._plan_end()
            case "parked" | "left" if attempt == state.attempt:
                outcome = "interrupted" if what == "parked" else "lost"
                for slot in list(state.alive):
                    self._decide(TrainerEnded(slot=slot, attempt=attempt, outcome=outcome, reason="simulated"))
            case "done" if attempt == state.attempt and self._since_s is not None:
                self._stop_training(is_loss=False)
                self._tally.finished_s = self._now_s
            case _:
                pass

    def _plan_end(self) -> None:
        left = self._setup.work_node_s - self._work
        if left == float("inf"):
            return
        size = len(self._state.members)
        # saves take their share; a bound that is too early is found out and moved on
        interval_s = self._rhythm.interval_s
        share = 1.0 if interval_s == float("inf") else interval_s / (interval_s + self._setup.saving.save_s)
        self._at(self._now_s + left / size / share, "done", self._state.attempt)

    # ---- the controller

    def _decide(self, event: Event) -> None:
        self._todo.append(event)
        while self._todo:
            taken = self._todo.popleft()
            before = self._state.stage
            if isinstance(taken, HostGone) and self._since_s is not None and taken.node in self._state.member_nodes:
                self._is_loss = True
            actions = controller.decide(self._state, taken, now_s=self._now_s)
            if before == "running" and self._state.stage in ("clearing", "waiting", "forming"):
                self._stop_training(is_loss=self._is_loss)
            for action in actions:
                self._carry_out(action)
            if self._state.stage != before:
                self._record_stage()

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
                    self._at(self._now_s + _PARK_S, "parked", action.attempt)
            case Leave() | Kill():
                if self._left != action.attempt:
                    self._left = action.attempt
                    self._at(self._now_s + _LEAVE_S, "left", action.attempt)
            case AttemptStarted():
                self._started_s = self._now_s
                self._tally.changes += 1
                self._tally.sizes.append((self._now_s, len(action.members)))
            case AttemptEnded():
                lived_s = self._now_s - self._started_s
                self._rhythm.observed(lived_s)
                self._tally.member_node_s += lived_s * len(action.members)
                self._tally.world_s += lived_s
                if action.kind == "lost":
                    self._tally.losses += 1
                    self._rhythm.lost()
                if not controller.get_usable(state):
                    self._tally.sizes.append((self._now_s, 0))
            case Done() | Go() | _:
                pass

    # ---- work

    def _begin_training(self) -> None:
        self._since_s = self._now_s

    def _stop_training(self, *, is_loss: bool) -> None:
        """Count what the current world has done until now; a loss takes what was not saved."""
        since_s, self._since_s = self._since_s, None
        if since_s is None or self._now_s <= since_s:
            return
        members, seconds = self._state.members, self._now_s - since_s
        size, stretch = len(members), self._rhythm.divide(seconds)
        worked, before = stretch.worked_s * size, self._work
        redone = min(worked, max(0.0, self._best - before))
        self._paint([slot.node for slot in members], since_s, redone / size, stretch.worked_s, stretch.saved_s)
        reached = before + worked
        self._best = max(self._best, reached)
        self._work = reached
        self._durable = max(self._durable, reached - self._setup.saving.durable_s * size)
        if is_loss:
            self._work = self._keep_after_loss(before, stretch.kept_s * size)
        self._tally.training_s += seconds
        self._tally.redone_node_s += redone
        self._tally.work.append((self._now_s, self._work))

    def _keep_after_loss(self, before: float, kept: float) -> float:
        """Return where work is taken up again.

        Args:
            before: at the start of the world that was lost.
            kept: of what it has done, what its last save has.
        """
        match self._setup.saving.kind:
            case "jit":  # of the step that was under way, half; without a survivor nobody saves
                kept = max(0.0, kept - self._setup.step_node_s / 2)
                is_gone = self._state.member_nodes <= self._removed.get(self._now_s, set())
            case "memory":
                is_gone = self._are_copies_lost()
            case _:
                is_gone = False
        return min(before + kept, self._durable) if is_gone else before + kept

    def _are_copies_lost(self) -> bool:
        """Tell whether a node goes together with the one that holds its copy, or all go."""
        members = sorted(self._state.member_nodes)
        gone = self._removed.get(self._now_s, set())
        peers = dict(zip(members, [*members[1:], *members[:1]], strict=True))
        return any(node in gone and peer in gone for node, peer in peers.items())

    def _paint(self, nodes: Iterable[str], since_s: float, redone_s: float, worked_s: float, saved_s: float) -> None:
        """Give the time of a stretch to its states; saves are put together, at its end."""
        spans: list[tuple[Phase, float, float]] = []
        at_s = since_s
        for phase, length_s in (("redo", redone_s), ("train", worked_s - redone_s), ("save", saved_s)):
            if length_s > 0:
                spans.append((phase, at_s, at_s + length_s))  # pyright: ignore[reportArgumentType] # a Phase each
                at_s += length_s
        for node in nodes:
            if self._ledger.is_open(node):
                for phase, start_s, end_s in spans:
                    self._ledger.report(node, phase, start_s, end_s)

    def _get_progress(self) -> Progress:
        step = int(self._work / self._setup.step_node_s) + 1
        return Progress(step=step, tokens=step)

    def _record_stage(self) -> None:
        """Switch the accounts as a real run's records do (`RunRecords.staged`)."""
        state = self._state
        phase: Phase = {
            "waiting": "wait",
            "forming": "reconfigure",
            "running": "load",
            "parking": "save",
            "clearing": "reconfigure",
            "done": "idle",
        }[state.stage]  # pyright: ignore[reportAssignmentType] # every value is a Phase
        members = {slot.node for slot in state.members}
        for slot in state.claims:
            if self._ledger.is_open(slot.node):
                self._ledger.switch(slot.node, phase if slot.node in members else "wait", self._now_s)

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
        tally.useful_node_s, tally.usd, tally.end_s = self._work, totals.usd, end_s
        tally.paid_node_s = totals.paid_gpu_s
        return tally


def simulate(fleet: Fleet, setup: Setup) -> Tally:
    """Play a run along a fleet."""
    return Simulation(fleet, setup).run()
