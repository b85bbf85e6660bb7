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

_REGROUP_S = 1.5
"""Trainers that have handed their state over leave a world and form the next one in less."""


def decide(
    *,
    seconds_left: float,
    rest_of_step_s: float,
    save_s: float | None,
    margin: float,
    copy_s: float = 0.0,
    keep_in: Literal["memory", "storage"] = "storage",
    is_snapshotting: bool = False,
) -> Decision:
    """Return what a rank that has a notice wants all ranks to do.

    A state is handed over once no other one is on its way to memory. Until then all train on, if there is time for
    that and for all that comes after it.

    Args:
        seconds_left: time until this node is gone; infinite for a planned change.
        rest_of_step_s: usual seconds until the update of the step under way is made; infinite if that is unknown.
        save_s: estimated seconds until a state is safe in `keep_in`, begun now; None if nothing is known of that.
        margin: a save is begun only if `margin` times its estimate is left.
        copy_s: estimated seconds in which this rank's part goes from one node to another.
        keep_in: where the state must be safe.
        is_snapshotting: a snapshot is on its way to memory.
    """
    finish: Decision = "finish_and_hand_over" if keep_in == "memory" else "finish_and_save"
    would_wait = is_snapshotting and keep_in == "memory"
    if math.isinf(seconds_left):
        return "settle" if would_wait else finish
    need_s = margin * (save_s or 0.0)
    if would_wait and seconds_left - rest_of_step_s >= 2 * need_s + _REGROUP_S + margin * copy_s:
        return "settle"
    spare_s = seconds_left - need_s
    if spare_s <= 0:
        return "leave_now"
    if spare_s > rest_of_step_s:
        return finish
    return "hand_over_now" if keep_in == "memory" else "save_now"


def needs_copies(*, seconds_left: float, save_s: float, copy_s: float) -> bool:
    """Tell whether a state that is handed over must be copied to other nodes before its own leave.

    The next world fetches what it needs from the nodes that leave, if they live until it has formed and fetched: a copy
    takes as long as that, and no rank trains meanwhile. One is made only where there is time for it and not for the
    other; where there is time for neither, the next world fetches what it can, and else has what is older.

    Args:
        seconds_left: as for `decide`.
        save_s: estimated seconds until the state is in this node's memory.
        copy_s: as for `decide`.
    """
    if math.isinf(seconds_left) or seconds_left >= save_s + _REGROUP_S + copy_s:
        return False
    return seconds_left >= save_s + copy_s


def agree(counts: Sequence[float]) -> Decision:
    """Return what all ranks do, given how many of them want each of `URGENCY`."""
    wanted: list[Decision] = [decision for decision, count in zip(URGENCY, counts, strict=True) if count > 0]
    return wanted[-1] if wanted else "continue"
