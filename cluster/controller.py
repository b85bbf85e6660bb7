"""Who trains: a pure state machine over slots (places for one trainer each) and attempts (one world each).

`decide(state, event, now_s)` changes `state` and returns the actions to carry out; it does no I/O and reads no clock.
The policy is the simplest that is correct: whatever changes, the trainers of the old world end (parked behind a
checkpoint if there is time, killed if a member is gone) and those of the new one start from the newest committed
checkpoint. An attempt goes through

    waiting -> forming -> running -> parking -> clearing -> waiting
                  |          `----------------> clearing      (a member was lost)
                  `---------------------------> clearing
    waiting -> done                                            (finished, failed or stopped)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from cluster.types import (
    Action,
    AttemptEnded,
    AttemptStarted,
    Change,
    Claimed,
    Done,
    Draining,
    Event,
    Expired,
    Fork,
    Go,
    HostGone,
    Kill,
    Park,
    Slot,
    Stepped,
    Stop,
    Tick,
    TrainerEnded,
    TrainerReady,
)

Stage = Literal["waiting", "forming", "running", "parking", "clearing", "done"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers that the decisions hang on."""

    min_workers: int
    max_workers: int
    max_failures_without_progress: int
    gather_s: float = 10.0
    """How long the first agents of a group wait for the others, in seconds."""
    form_s: float = 60.0
    """A world that has not formed within this is given up."""
    park_s: float = 120.0
    """A world that has not parked within this is killed; a nearer deadline of the notice wins."""


class Blame(IntEnum):
    """How sure we are of the cause of a loss: peers of a dead trainer often report before its own host does."""

    NOBODY = 0
    A_PEER = 1
    TRAINER = 2
    NODE = 3


@dataclass(kw_only=True)
class State:
    """Everything the decisions depend on."""

    policy: Policy
    attempt: int = 0
    """The last attempt that was started, over the life of the run."""
    stage: Stage = "waiting"
    claims: dict[Slot, int] = field(default_factory=dict[Slot, int])
    """Slots with a living host and a valid lease, and the group that claimed each last."""
    group: int = 0
    group_size: int = 0
    gather_until_s: float = 0.0
    draining: dict[str, Draining] = field(default_factory=dict[str, Draining])
    members: tuple[Slot, ...] = ()
    """Slots of the current attempt, by rank."""
    alive: set[Slot] = field(default_factory=set[Slot])
    """Members whose trainer has not ended."""
    ready: dict[Slot, TrainerReady] = field(default_factory=dict[Slot, TrainerReady])
    stage_until_s: float = 0.0
    ending: AttemptEnded | None = None
    """Why the current attempt ends, from the moment that is known."""
    blame: Blame = Blame.NOBODY
    """Who took the current attempt down; a better founded suspicion replaces a weaker one."""
    best_step: int = 0
    failures_without_progress: int = 0
    progressed: bool = False
    """The current attempt has finished a step that none had before."""
    stop: Done | None = None
    """The run ends with this as soon as the trainers are gone."""


def decide(state: State, event: Event, *, now_s: float) -> list[Action]:
    """Take one event in and return what to do, in order."""
    actions = _take(state, event, now_s)
    return actions + _advance(state, now_s)


def get_wanted(state: State) -> tuple[Slot, ...]:
    """Return the slots the next world is made of, by rank: ranks of one node are neighbours."""
    usable = [slot for slot in sorted(state.claims) if slot.node not in state.draining]
    members = [slot for slot in usable if slot in state.members]
    others = [slot for slot in usable if slot not in state.members]
    return tuple(sorted((members + others)[: state.policy.max_workers]))


def _take(state: State, event: Event, now_s: float) -> list[Action]:
    """Book what the event says; the loss of a member ends the attempt."""
    match event:
        case HostGone():
            state.claims = {slot: group for slot, group in state.claims.items() if slot.node != event.node}
            state.draining.pop(event.node, None)
            gone = [slot for slot in state.members if slot.node == event.node]
            return _lose(state, gone, Blame.NODE, event.reason, now_s)
        case Expired():
            state.claims.pop(event.slot, None)
            return _lose(state, [event.slot], Blame.NODE, "no agent claimed it in time", now_s)
        case Claimed():
            if event.group > state.group:
                state.group, state.group_size = event.group, event.group_size
                state.gather_until_s = now_s + state.policy.gather_s
            state.claims[event.slot] = event.group
        case Draining():
            state.draining.setdefault(event.node, event)
        case TrainerReady():
            if event.attempt == state.attempt and event.slot in state.alive:
                state.ready[event.slot] = event
        case TrainerEnded():
            return _end_trainer(state, event, now_s)
        case Stepped():
            if event.attempt == state.attempt and event.progress.step > state.best_step:
                state.best_step, state.progressed = event.progress.step, True
        case Stop():
            state.stop = state.stop or Done(kind="interrupted", reason=event.reason, exit_code=3)
        case Tick():
            pass
    return []


def _end_trainer(state: State, event: TrainerEnded, now_s: float) -> list[Action]:
    if event.attempt != state.attempt or event.slot not in state.alive:
        return []
    match event.kind:
        case "crashed":
            return _lose(state, [event.slot], Blame.TRAINER, event.reason, now_s)
        case "lost":
            return _lose(state, [event.slot], Blame.A_PEER, event.reason, now_s)
        case "killed" if state.stage != "clearing":
            return _lose(state, [event.slot], Blame.NODE, event.reason, now_s)
        case "killed" | "interrupted":
            state.alive.discard(event.slot)
            state.ending = state.ending or _ended(state, "stopped", event.reason, None, now_s)
        case "finished":
            state.alive.discard(event.slot)
            state.ending = _ended(state, "finished", event.reason, None, now_s)
            state.stop = Done(kind="finished", reason=event.reason, exit_code=0)
        case "failed":
            state.alive.discard(event.slot)
            state.ending = _ended(state, "failed", event.reason, None, now_s)
            state.stop = Done(kind="failed", reason=event.reason, exit_code=event.exit_code)
            return _clear(state, now_s)
    return []


def _lose(state: State, slots: Sequence[Slot], blame: Blame, reason: str, now_s: float) -> list[Action]:
    """Take dead members out; the first death kills the rest of a world that can only hang without them."""
    dead = state.alive.intersection(slots)
    state.alive -= dead
    was_member = bool(set(slots) & set(state.members)) and state.stage not in ("waiting", "done")
    if was_member and blame > state.blame and not (state.stop and state.stop.kind in ("finished", "failed")):
        noticed_s = state.ending.noticed_s if state.ending else now_s
        change = "node_lost" if blame is Blame.NODE else "trainer_lost"
        state.ending = _ended(state, change, reason, slots[0].node, noticed_s)
        state.blame = blame
    return _clear(state, now_s) if dead and state.stage != "clearing" else []


def _ended(state: State, change: Change, reason: str, cause: str | None, noticed_s: float) -> AttemptEnded:
    return AttemptEnded(
        attempt=state.attempt,
        members=state.members,
        change=change,
        reason=reason,
        cause=cause,
        noticed_s=noticed_s,
    )


def _clear(state: State, now_s: float) -> list[Action]:
    state.stage, state.stage_until_s = "clearing", now_s + state.policy.form_s
    return [Kill(slot=slot, attempt=state.attempt) for slot in sorted(state.alive)]


def _advance(state: State, now_s: float) -> list[Action]:
    """Move on as far as the booked facts allow."""
    actions: list[Action] = []
    if state.stage == "forming":
        actions += _form(state, now_s)
    if state.stage == "running":
        actions += _change_if_due(state, now_s)
    if state.stage in ("forming", "parking") and now_s > state.stage_until_s:
        state.ending = state.ending or _ended(state, "trainer_lost", "the world did not form in time", None, now_s)
        actions += _clear(state, now_s)
    if state.stage in ("running", "parking", "clearing") and not state.alive:
        actions += _close(state)
    if state.stage == "waiting":
        actions += _start_if_possible(state, now_s)
    return actions


def _form(state: State, now_s: float) -> list[Action]:
    if state.stop is not None:
        state.ending = _ended(state, "stopped", state.stop.reason, None, now_s)
        return _clear(state, now_s)
    if set(state.members) != set(state.ready):
        return []
    state.stage = "running"
    store = state.ready[state.members[0]]
    nodes = [slot.node for slot in state.members]
    return [
        Go(
            slot=slot,
            attempt=state.attempt,
            rank=rank,
            world_size=len(nodes),
            local_rank=nodes[:rank].count(slot.node),
            local_world_size=nodes.count(slot.node),
            store_host=store.store_host,
            store_port=store.store_port,
        )
        for rank, slot in enumerate(state.members)
    ]


def _change_if_due(state: State, now_s: float) -> list[Action]:
    """Park a running world if it must shrink, can grow or shall stop."""
    if len(state.alive) < len(state.members):  # it ends by itself
        return []
    notices = [state.draining[slot.node] for slot in state.members if slot.node in state.draining]
    deadlines = [n.deadline_s for n in notices if n.deadline_s is not None]
    cause = notices[0].node if notices else None
    change: Change
    if state.stop is not None:
        change, reason = "stopped", state.stop.reason
    elif notices:
        change, reason = "node_drained", notices[0].reason
    elif len(get_wanted(state)) > len(state.members) and _is_gathered(state, now_s):
        change, reason = "node_added", f"grow to {len(get_wanted(state))}"
        cause = next(slot.node for slot in get_wanted(state) if slot not in state.members)
    else:
        return []
    state.ending = _ended(state, change, reason, cause, now_s)
    deadline_s = min(deadlines, default=None)
    state.stage = "parking"
    state.stage_until_s = min([now_s + state.policy.park_s, *deadlines])
    return [Park(slot=slot, attempt=state.attempt, reason=reason, deadline_s=deadline_s) for slot in state.members]


def _close(state: State) -> list[Action]:
    """Book the end of an attempt whose trainers are all gone."""
    ending = state.ending
    assert ending is not None  # no trainer ends without a reason being booked
    if state.progressed or ending.kind == "interrupted":
        state.failures_without_progress = 0
    elif state.blame is not Blame.NODE:  # losing nodes is business as usual
        state.failures_without_progress += 1
        if state.failures_without_progress >= state.policy.max_failures_without_progress and state.stop is None:
            state.stop = Done(
                kind="failed",
                reason=f"{state.failures_without_progress} attempts in a row got no further than step "
                f"{state.best_step}; the last one: {ending.reason}",
                exit_code=1,
            )
    state.stage, state.ending, state.ready, state.progressed = "waiting", None, {}, False
    state.blame = Blame.NOBODY
    return [ending]


def _is_gathered(state: State, now_s: float) -> bool:
    """Every agent of the newest group has claimed its slot, or was waited for long enough."""
    newest = sum(1 for group in state.claims.values() if group == state.group)
    return newest >= state.group_size or now_s >= state.gather_until_s


def _start_if_possible(state: State, now_s: float) -> list[Action]:
    if state.stop is not None:
        state.stage = "done"
        return [state.stop]
    wanted = get_wanted(state)
    survivors = any(slot in state.members for slot in wanted)
    if len(wanted) < state.policy.min_workers or not (survivors or _is_gathered(state, now_s)):
        return []
    state.attempt += 1
    state.members, state.alive = wanted, set(wanted)
    state.stage, state.stage_until_s = "forming", now_s + state.policy.form_s
    started = AttemptStarted(attempt=state.attempt, members=wanted)
    return [started, *(Fork(slot=slot, attempt=state.attempt) for slot in wanted)]
