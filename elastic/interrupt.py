"""What to do about a notice: pure. Each rank decides for itself, and the most urgent decision of any counts for all.

The decisions of all ranks are counted in sums that a step needs anyway, so a notice costs no message of its own.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

Decision = Literal[
    "continue", "settle", "finish_and_hand_over", "finish_and_save", "hand_over_now", "save_now", "leave_now"
]
"""From calm to urgent. A state is saved to the storage, or handed over in the memory of the nodes to a world that goes
on at once.
`settle`: train on, but begin no save, until the snapshot under way is safe; then a state is handed over.
`..._now`: the step under way is given up before its update; the state of the step before is what is saved."""

URGENCY: tuple[Decision, ...] = get_args(Decision)[1:]
"""What ranks with a notice may want; their order is that of the counts."""

STAY: frozenset[Decision] = frozenset({"continue", "settle"})
"""Those with which the next step is trained."""

GIVE_UP: frozenset[Decision] = frozenset({"hand_over_now", "save_now", "leave_now"})
"""Those that leave the step under way unfinished."""

_REGROUP_S = 5.0
"""Trainers leave a world and form the next one in less, also where one of them must be killed for it."""


def decide(
    *,
    seconds_left: float,
    rest_of_step_s: float,
    usual_save_s: float | None,
    margin: float,
    keep_in: Literal["memory", "storage"] = "storage",
    is_keeping: bool = False,
) -> Decision:
    """Return what a rank that has a notice wants all ranks to do.

    A state can be handed over once the snapshot before it, if one is under way, is safe. Until then all train on, if
    there is so much time that nothing need be copied (`needs_copies`).

    Args:
        seconds_left: time until this node is gone; infinite for a planned change.
        rest_of_step_s: usual seconds until the update of the step under way is made; infinite if that is unknown.
        usual_save_s: measured seconds until a state is safe in `keep_in`; None if none was saved there yet.
        margin: a save is begun only if `margin` times its usual time is left.
        keep_in: where the state must be safe.
        is_keeping: a snapshot is on its way to memory.
    """
    finish: Decision = "finish_and_hand_over" if keep_in == "memory" else "finish_and_save"
    would_wait = is_keeping and keep_in == "memory"
    if math.isinf(seconds_left):
        return "settle" if would_wait else finish
    left_s = seconds_left - rest_of_step_s
    if would_wait and not needs_copies(seconds_left=left_s, usual_save_s=usual_save_s, margin=margin):
        return "settle"
    spare_s = seconds_left - margin * (usual_save_s or 0.0)
    if spare_s <= 0:
        return "leave_now"
    if spare_s > rest_of_step_s:
        return finish
    return "hand_over_now" if keep_in == "memory" else "save_now"


def needs_copies(*, seconds_left: float, usual_save_s: float | None, margin: float) -> bool:
    """Tell whether a state that is handed over must be copied to other nodes as well.

    The next world fetches what it needs from the nodes that leave, if they live for so long: until it is handed over,
    fetched, and in other memories as part of the next world's first snapshot. Each takes about as long as a save, of
    which a copy is the longest part where the network is slow; nobody trains while copies are made that nobody reads.

    Args:
        seconds_left: as for `decide`.
        usual_save_s: measured seconds until a state is safe in memory, its copies included; None if none was saved yet.
        margin: so many times the usual time must be left.
    """
    if math.isinf(seconds_left):
        return False
    return usual_save_s is None or seconds_left < _REGROUP_S + margin * 3 * usual_save_s


def agree(counts: Sequence[float]) -> Decision:
    """Return what all ranks do, given how many of them want each of `URGENCY`."""
    wanted: list[Decision] = [decision for decision, count in zip(URGENCY, counts, strict=True) if count > 0]
    return wanted[-1] if wanted else "continue"
