"""What is done about a process that was killed and does not end: its slot, then its node, is left out.

A process in state D (a hung GPU driver, a hard NFS mount) takes no signal until the kernel lets go of it, which may be
never. It never runs its own code again either, so a world may go on without it at once. Only its slot is of no use:
what it held, such as the memory of a GPU, is not free.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.types import Action, GiveUp, LeaveOut, Slot, TakeBack

if TYPE_CHECKING:  # the state is made of what is defined here
    from cluster.controller.state import State


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A slot that no world is made of."""

    attempt: int
    """Whose trainer has not ended."""
    since_s: float
    reason: str


def leave_out(state: "State", slots: Iterable[Slot], *, reason: str | None, now_s: float) -> list[Action]:
    """Go on without slots whose processes do not end.

    Args:
        reason: what their host knows, if it has said anything.
    """
    actions: list[Action] = []
    for slot in sorted(slots):
        why = reason or f"its process has not ended within {state.policy.kill_s:g} s after it was killed"
        state.alive.discard(slot)
        state.usable = None
        state.left_out[slot] = LeftOut(attempt=state.attempt, since_s=now_s, reason=why)
        actions.append(LeaveOut(slot=slot, reason=why))
    return actions


def take_back(state: "State", slot: Slot, attempt: int, *, now_s: float) -> list[Action]:
    """Let a slot train again once the process that was in the way has ended."""
    left_out = state.left_out.get(slot)
    if left_out is None or attempt != left_out.attempt:
        return []
    del state.left_out[slot]
    state.usable = None
    return [TakeBack(slot=slot, after_s=now_s - left_out.since_s)]


def forget_node(state: "State", node: str) -> None:
    """Forget what is known of a node whose host is gone: the next one tells of its own processes."""
    state.usable = None
    state.left_out = {slot: left_out for slot, left_out in state.left_out.items() if slot.node != node}
    state.given_up.discard(node)


def give_up_nodes(state: "State", *, now_s: float) -> list[Action]:
    """Give up each node that can train nothing, and has not for long: it needs a restart, and is paid for meanwhile.

    One that trains in other slots goes on: to drain it could cost most of a fleet for the sake of one GPU.
    """
    actions: list[Action] = []
    if not state.left_out:
        return actions
    for node in sorted({slot.node for slot in state.left_out} - state.given_up):
        idle = [left_out for slot, left_out in state.left_out.items() if slot.node == node]
        has_others = any(slot.node == node and slot not in state.left_out for slot in state.claims)
        since_s = max(left_out.since_s for left_out in idle)
        if has_others or now_s < since_s + state.policy.give_up_s:
            continue
        state.given_up.add(node)
        reason = f"nothing on it can train for {now_s - since_s:.0f} s: {idle[0].reason}. It needs a restart"
        actions.append(GiveUp(node=node, reason=reason))
    return actions
