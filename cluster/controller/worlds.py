"""Which slots the next world is made of, and when the running one should make room for it. Pure."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from statistics import median

from cluster.controller.state import Notice, State
from cluster.types import Slot


def get_usable(state: State) -> tuple[Slot, ...]:
    """Return the slots that may train, those to prefer first: members before others, and ranks of a node together.

    Slots in which a process does not end may not, nor those of draining nodes, nor those of denied ones, unless there
    is no world without these: a node that crashes now and then is better than none.
    """
    if state.usable is None:
        state.usable = _find_usable(state)
    return state.usable


def _find_usable(state: State) -> tuple[Slot, ...]:
    free = sorted(state.claims.keys() - state.left_out.keys(), key=get_order)
    staying = [slot for slot in free if slot.node not in state.draining]
    staying.sort(key=lambda slot: slot not in state.ranks)
    trusted = [slot for slot in staying if slot.node not in state.failures.denied]
    if fit_size(state.policy.world_sizes, len(trusted)):
        return tuple(trusted)
    return tuple(sorted(staying, key=lambda slot: slot.node in state.failures.denied))


def get_wanted(state: State) -> tuple[Slot, ...]:
    """Return the slots of the next world, by rank (those of one node are neighbours); none if there are too few."""
    usable = get_usable(state)
    return tuple(sorted(usable[: fit_size(state.policy.world_sizes, len(usable))], key=get_order))


def get_order(slot: Slot) -> tuple[str, str]:
    """Return what slots are sorted by, many times faster than they compare themselves."""
    return slot.node, slot.name


def fit_size(world_sizes: Sequence[int], num_slots: int) -> int:
    """Return the largest of ascending sizes that so many slots can fill; 0 if there is none."""
    num_smaller = bisect_right(world_sizes, num_slots)
    return world_sizes[num_smaller - 1] if num_smaller else 0


def is_gathered(state: State, now_s: float) -> bool:
    """Every agent of the newest group has claimed its slot, or was waited for long enough."""
    return len(state.newest) >= state.group_size or now_s >= state.gather_until_s


def get_joiner(state: State, now_s: float) -> Slot | None:
    """Return a slot for whose sake the running world should grow now, if there is one.

    Not before the last change has paid for itself: what joins until then joins together.
    """
    if len(state.claims) <= len(state.members) or state.first_step_s is None or not is_gathered(state, now_s):
        return None
    if now_s < state.first_step_s + state.policy.growth_patience * get_usual_outage_s(state):
        return None
    wanted = get_wanted(state)
    if len(wanted) <= len(state.members):
        return None
    return next(slot for slot in wanted if slot not in state.ranks)


def get_usual_outage_s(state: State) -> float:
    """Return what a change costs, in seconds without a step."""
    return median(state.outages_s) if state.outages_s else state.policy.first_outage_s


def get_member_notices(state: State) -> dict[str, Notice]:
    """Return the notices that the current world must heed, by node, the oldest first."""
    notices = [(node, notice) for node, notice in state.draining.items() if node in state.member_nodes]
    return dict(sorted(notices, key=lambda item: (item[1].heard_s, item[0])))


def get_deadline_s(notices: Collection[Notice]) -> float | None:
    """Return the nearest of the deadlines that are known."""
    return min((notice.deadline_s for notice in notices if notice.deadline_s is not None), default=None)


def get_leave_s(state: State) -> float:
    """Return when the running world must park because of its notices; infinite if there are none.

    Survivors leave early: a moment after the first notice, in which others may join it. If nobody could go on, that
    would only waste the time until the deadline; the world then trains on, once it is known how long a park takes.
    """
    notices = get_member_notices(state).values()
    if not notices:
        return float("inf")
    together_s = min(notice.heard_s for notice in notices) + state.policy.notice_window_s
    deadline_s = get_deadline_s(notices)
    if deadline_s is None:
        return together_s
    latest_s = deadline_s - max(state.policy.leave_reserve_s, 2 * (state.slowest_park_s or 0.0))
    if state.slowest_park_s is not None and not get_wanted(state):
        return latest_s
    return min(together_s, latest_s)
