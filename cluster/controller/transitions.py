"""The stages of an attempt, and what each event means in them.

Whatever changes, the trainers of the old world leave it (parked behind a snapshot or a checkpoint if there is time, at
once if a member is gone), and those of the new one start from the newest state there is. Processes stay; one that does
not leave in time is killed, and its host has another one ready; one that does not die of that is left out with its
slot, so that no stage but `running` and `waiting` lasts longer than its limit. An attempt goes through

    waiting -> forming -> running -> parking -> clearing -> waiting
                  |          `----------------> clearing      (a member was lost)
                  `---------------------------> clearing      (or has a notice, or the run stops)
    waiting -> done                                            (finished, failed or stopped)
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

from cluster.controller.failures import count_failure, deny_suspect
from cluster.controller.stalls import Stalls, describe, find_culprits
from cluster.controller.state import Blame, Notice, State
from cluster.controller.unkillable import forget_node, give_up_nodes, leave_out, take_back
from cluster.controller.worlds import (
    fit_size,
    get_deadline_s,
    get_joiner,
    get_leave_s,
    get_member_notices,
    get_usable,
    get_wanted,
    is_gathered,
)
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
    GenerationTaken,
    Go,
    HostGone,
    Join,
    Kill,
    Leave,
    Park,
    Slot,
    Stalled,
    Stepped,
    Stop,
    TakeGeneration,
    Tick,
    TrainerDying,
    TrainerEnded,
    TrainerReady,
    Undrained,
    Unkillable,
)

_REMEMBERED_OUTAGES = 5


def decide(state: State, event: Event, *, now_s: float) -> list[Action]:
    """Take one event in and return what to do, in order."""
    if state.stage == "done":
        return []
    actions = _take(state, event, now_s)
    return actions + _advance(state, now_s)


def _take(state: State, event: Event, now_s: float) -> list[Action]:  # noqa: PLR0911, PLR0912 (a branch per event)
    """Record what the event says; the loss of a member ends the attempt."""
    match event:
        case HostGone():
            for slot in [slot for slot in state.claims if slot.node == event.node]:
                _forget_claim(state, slot)
            forget_node(state, event.node)
            gone = [slot for slot in state.members if slot.node == event.node]
            return _lose(state, gone, Blame.NODE, event.reason, now_s)
        case Expired():
            _forget_claim(state, event.slot)
            state.left_out.pop(event.slot, None)
            return _lose(state, [event.slot], Blame.NODE, "Ray Train has a whole group without it", now_s)
        case Claimed():
            _take_claim(state, event, now_s)
        case Draining():
            return _take_notice(state, event, now_s)
        case Undrained():
            state.draining.pop(event.node, None)
            state.usable = None
        case GenerationTaken():
            state.taken_generation = event.attempt
        case TrainerReady():
            if event.attempt == state.attempt and event.slot in state.alive:
                state.ready[event.slot] = event
        case TrainerDying():
            return _take_dying(state, event, now_s)
        case TrainerEnded():
            return take_back(state, event.slot, event.attempt, now_s=now_s) + _end_trainer(state, event, now_s)
        case Unkillable():
            return _take_unkillable(state, event, now_s)
        case Stepped():
            _take_step(state, event, now_s)
        case Stalled():
            return _take_stall(state, event, now_s)
        case Stop():
            state.stop = state.stop or Done(kind="interrupted", reason=event.reason, exit_code=3)
        case Tick():
            pass
    return []


def _take_claim(state: State, event: Claimed, now_s: float) -> None:
    if event.group > state.group:
        state.group, state.group_size, state.newest = event.group, event.group_size, set()
        state.gather_until_s = now_s + state.policy.gather_s
    if event.slot not in state.claims:
        state.usable = None
    state.claims[event.slot] = event.group
    (state.newest.add if event.group == state.group else state.newest.discard)(event.slot)


def _forget_claim(state: State, slot: Slot) -> None:
    state.claims.pop(slot, None)
    state.newest.discard(slot)
    state.usable = None


def _take_notice(state: State, event: Draining, now_s: float) -> list[Action]:
    """Record a notice, or its new deadline; trainers that park already learn of a nearer one."""
    heard_s = state.draining[event.node].heard_s if event.node in state.draining else now_s
    state.draining[event.node] = Notice(heard_s=heard_s, deadline_s=event.deadline_s, reason=event.reason)
    state.usable = None
    if state.stage != "parking" or event.node not in state.member_nodes:
        return []
    assert state.ending is not None  # it parks for that reason
    if state.ending.change == "node_added":
        state.ending = _ended(state, "node_drained", event.reason, event.node, heard_s)
    return _park(state) if event.deadline_s != state.park_deadline_s else []


def _take_step(state: State, event: Stepped, now_s: float) -> None:
    if event.attempt != state.attempt:
        return
    if state.first_step_s is None:
        state.first_step_s = now_s
        if state.leaving_s is not None:
            outage_s = state.leaving_s + now_s - state.started_s
            state.outages_s = (*state.outages_s, outage_s)[-_REMEMBERED_OUTAGES:]
    if event.progress.step > state.failures.best_step:
        state.failures = replace(state.failures, best_step=event.progress.step)
        state.progressed = True
    # whichever member says it: a step takes all of them, so those that complained before it go on as well
    state.stalls.forget_before(event.progress.step)


def _take_stall(state: State, event: Stalled, now_s: float) -> list[Action]:
    """End a world that hangs, once it is clear who holds it up, or that nobody in particular does."""
    is_member = event.attempt == state.attempt and event.slot in state.alive
    if not is_member or state.stage not in ("running", "parking"):
        return []
    state.stalls.add(event)
    culprits = find_culprits(state.stalls.by_slot, state.alive) if state.stalls.may_tell(len(state.alive)) else None
    if culprits is None:
        return []
    nodes = {slot.node for slot in culprits}
    reason = describe(state.stalls.by_slot, state.members, culprits)
    node = nodes.pop() if len(nodes) == 1 else None
    _suspect(state, node, Blame.TRAINER, reason, now_s, change="trainer_stalled")
    return _clear(state, now_s, kill=culprits)


def _take_unkillable(state: State, event: Unkillable, now_s: float) -> list[Action]:
    """Go on without a member whose host cannot end its process, or that one before it in the slot."""
    if event.attempt != state.attempt or event.slot not in state.alive:
        return []
    actions = leave_out(state, [event.slot], reason=event.reason, now_s=now_s)
    if state.stage == "clearing":  # why that world ends is known
        return actions
    _suspect(state, event.slot.node, Blame.TRAINER, event.reason, now_s)
    return actions + _clear(state, now_s)


def _take_dying(state: State, event: TrainerDying, now_s: float) -> list[Action]:
    """Let the others leave at once; who is to blame is said when the trainer has ended, and the next world waits for
    that: its GPU is not free before."""
    if event.attempt != state.attempt or event.slot not in state.alive or state.stage in ("clearing", "done"):
        return []
    _suspect(state, event.slot.node, Blame.A_PEER, "a trainer is dying", now_s)
    return _clear(state, now_s)


def _end_trainer(state: State, event: TrainerEnded, now_s: float) -> list[Action]:
    if event.attempt != state.attempt or event.slot not in state.alive:
        return []
    match event.outcome:
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
            return _clear(state, now_s) if state.stage != "clearing" else []
    return []


def _lose(state: State, slots: Sequence[Slot], blame: Blame, reason: str, now_s: float) -> list[Action]:
    """Take dead members out; with the first, the rest leave a world that can only hang without it."""
    dead = state.alive.intersection(slots)
    state.alive -= dead
    if any(slot in state.ranks for slot in slots):
        _suspect(state, None if blame is Blame.A_PEER else slots[0].node, blame, reason, now_s)
    return _clear(state, now_s) if dead and state.stage != "clearing" else []


def _suspect(
    state: State, node: str | None, blame: Blame, reason: str, now_s: float, *, change: Change | None = None
) -> None:
    """Record why the current world falls, unless something better founded is known already.

    Args:
        node: where the cause lies; None if that is not certain.
        change: what happened, if it is not simply that a node or trainer is gone.
    """
    is_decided = state.stop is not None and state.stop.kind in ("finished", "failed")
    if state.stage in ("waiting", "done") or blame <= state.blame or is_decided:
        return
    noticed_s = state.ending.noticed_s if state.ending else now_s
    change = change or ("node_lost" if blame is Blame.NODE else "trainer_lost")
    state.ending = _ended(state, change, reason, node, noticed_s)
    state.blame = blame


def _ended(state: State, change: Change, reason: str, cause: str | None, noticed_s: float) -> AttemptEnded:
    return AttemptEnded(
        attempt=state.attempt,
        members=state.members,
        change=change,
        reason=reason,
        cause=cause,
        noticed_s=noticed_s,
    )


def _clear(state: State, now_s: float, *, kill: Collection[Slot] = ()) -> list[Action]:
    """Have all members leave their world; those that cannot, or did not when they were asked, are killed."""
    state.stage, state.stage_until_s = "clearing", now_s + state.policy.leave_s
    leaving = [Leave(slot=slot, attempt=state.attempt) for slot in sorted(state.alive - set(kill))]
    return [*_kill(state, kill, now_s), *leaving]


def _kill(state: State, slots: Collection[Slot], now_s: float) -> list[Action]:
    for slot in slots:
        state.killed_s.setdefault(slot, now_s)
    return [Kill(slot=slot, attempt=state.attempt) for slot in sorted(slots)]


def _advance(state: State, now_s: float) -> list[Action]:
    """Move on as far as the recorded facts allow."""
    actions: list[Action] = []
    if state.stage == "forming":
        actions += _form(state, now_s)
    if state.stage == "running":
        actions += _change_if_due(state, now_s)
    if state.stage in ("forming", "parking", "clearing") and now_s > state.stage_until_s:
        actions += _give_up(state, now_s)
    if state.stop is None:
        actions += give_up_nodes(state, now_s=now_s)
    if state.stage in ("running", "parking", "clearing") and not state.alive:
        actions += _close(state, now_s)
    if state.stage == "waiting":
        actions += _start_if_possible(state, now_s)
    return actions


def _form(state: State, now_s: float) -> list[Action]:
    notices = get_member_notices(state)
    if state.stop is not None:
        state.ending = _ended(state, "stopped", state.stop.reason, None, now_s)
        return _clear(state, now_s)
    if notices and get_wanted(state):  # nothing is lost yet: better another world at once than one that must park
        node, notice = next(iter(notices.items()))
        state.ending = _ended(state, "node_drained", notice.reason, node, notice.heard_s)
        return _clear(state, now_s)
    if len(state.ready) < len(state.members):  # nobody else is recorded as ready
        return []
    state.stage = "running"
    store = state.ready[state.members[0]]
    num_on_node = Counter(slot.node for slot in state.members)
    ranks_on_node: Counter[str] = Counter()
    actions: list[Action] = []
    for rank, slot in enumerate(state.members):
        actions.append(
            Go(
                slot=slot,
                attempt=state.attempt,
                rank=rank,
                world_size=len(state.members),
                local_rank=ranks_on_node[slot.node],
                local_world_size=num_on_node[slot.node],
                store_host=store.store_host,
                store_port=store.store_port,
            )
        )
        ranks_on_node[slot.node] += 1
    return actions


def _give_up(state: State, now_s: float) -> list[Action]:
    """Kill what did not come to its next stage in time, again if need be, and leave out what does not die of that."""
    match state.stage:
        case "forming":
            late = {slot.node for slot in state.members if slot not in state.ready}
            cause = late.pop() if len(late) == 1 else None
            state.ending = _ended(state, "trainer_lost", "the world did not form in time", cause, now_s)
        case "parking":
            assert state.ending is not None  # it parks for that reason
            reason = f"{state.ending.reason}; its trainers did not leave in time and were killed"
            state.ending = replace(state.ending, reason=reason)
        case _:
            pass
    state.stage = "clearing"
    overdue = [slot for slot in state.alive if now_s > state.killed_s.get(slot, now_s) + state.policy.kill_s]
    actions = leave_out(state, overdue, reason=None, now_s=now_s)
    actions += _kill(state, state.alive, now_s)
    next_s = [state.killed_s[slot] + state.policy.kill_s for slot in state.alive]
    state.stage_until_s = min([now_s + state.policy.leave_s, *next_s])
    return actions


def _change_if_due(state: State, now_s: float) -> list[Action]:
    """Park a running world if it must shrink, can grow or shall stop."""
    if len(state.alive) < len(state.members):  # it ends by itself
        return []
    if state.stop is not None:
        state.ending = _ended(state, "stopped", state.stop.reason, None, now_s)
    elif now_s >= get_leave_s(state):
        node, notice = next(iter(get_member_notices(state).items()))
        state.ending = _ended(state, "node_drained", notice.reason, node, notice.heard_s)
    elif joiner := get_joiner(state, now_s):
        state.ending = _ended(state, "node_added", f"grow to {len(get_wanted(state))}", joiner.node, now_s)
    else:
        return []
    state.stage, state.parking_since_s = "parking", now_s
    return _park(state)


def _park(state: State) -> list[Action]:
    """Ask the trainers to leave, by the nearest deadline."""
    assert state.ending is not None
    assert state.parking_since_s is not None
    deadline_s = get_deadline_s(get_member_notices(state).values())
    limits_s = [state.parking_since_s + state.policy.park_s, *([] if deadline_s is None else [deadline_s])]
    state.park_deadline_s, state.stage_until_s = deadline_s, min(limits_s)
    wanted = get_wanted(state)
    keep_in = "memory" if state.stop is None and wanted else "storage"
    park = partial(Park, attempt=state.attempt, reason=state.ending.reason, deadline_s=deadline_s, keep_in=keep_in)
    staying = set(wanted)
    return [park(slot=slot, leaves=slot not in staying) for slot in state.members if slot in state.alive]


def _close(state: State, now_s: float) -> list[Action]:
    """Record the end of an attempt whose trainers are all gone."""
    ending = state.ending
    assert ending is not None  # no trainer ends without a reason being recorded
    since_s = ending.noticed_s if state.parking_since_s is None else state.parking_since_s
    state.leaving_s = now_s - since_s
    if state.stage == "parking":
        state.slowest_park_s = max(state.slowest_park_s or 0.0, state.leaving_s)
    ending = _judge(state, ending)
    state.stage, state.ending, state.ready, state.progressed = "waiting", None, {}, False
    state.stalls, state.killed_s = Stalls(), {}
    state.blame, state.first_step_s = Blame.NOBODY, None
    state.parking_since_s = state.park_deadline_s = None
    return [ending]


def _judge(state: State, ending: AttemptEnded) -> AttemptEnded:
    """Leave out a node, or stop the run, if the same has failed often enough."""
    policy = state.policy
    state.failures = count_failure(
        state.failures, change=ending.change, cause=ending.cause, progressed=state.progressed
    )
    failures = state.failures
    if ending.change not in ("trainer_lost", "trainer_stalled") or state.stop is not None:
        return ending
    others = [slot for slot in get_usable(state) if slot.node not in failures.denied | {ending.cause}]
    # a trainer that hangs costs far more than one that crashes, and seldom has its cause in the data
    max_strikes = min(2, policy.max_node_failures) if ending.change == "trainer_stalled" else policy.max_node_failures
    is_bad = ending.cause == failures.suspect is not None and failures.strikes >= max_strikes
    if is_bad and fit_size(policy.world_sizes, len(others)):
        state.failures, state.usable = deny_suspect(failures), None
        return replace(ending, denied=ending.cause)  # the rest have one more try, whatever the row says
    if failures.without_progress >= policy.max_failures_without_progress:
        times = f"{failures.without_progress} times in a row"
        state.stop = Done(
            kind="failed",
            reason=f"step {failures.best_step + 1} failed {times}, so going on would "
            f"cost money for nothing. The last time: {ending.reason}. Find the cause in the log above, then start the "
            "same command again: it resumes",
            exit_code=1,
        )
    return ending


def _start_if_possible(state: State, now_s: float) -> list[Action]:
    if state.stop is not None:
        state.stage = "done"
        return [state.stop]
    if not (state.members or is_gathered(state, now_s)):
        return []
    wanted = get_wanted(state)
    survivors = any(slot in state.ranks for slot in wanted)
    if not wanted or not (survivors or is_gathered(state, now_s)):
        return []
    generation = state.attempt + 1
    # whose world it will be is decided when it is ours: until then nothing begins
    if state.taken_generation != generation:
        actions: list[Action] = [] if state.asked_generation == generation else [TakeGeneration(attempt=generation)]
        state.asked_generation = generation
        return actions
    state.attempt = generation
    state.members, state.alive, state.usable = wanted, set(wanted), None
    state.stage, state.started_s, state.stage_until_s = "forming", now_s, now_s + state.policy.form_s
    started = AttemptStarted(attempt=state.attempt, members=wanted)
    return [started, *(Join(slot=slot, attempt=state.attempt) for slot in wanted)]
