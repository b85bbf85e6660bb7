"""What to do about a notice: pure. Each rank decides for itself, and the most urgent decision of any counts for all.

The decisions of all ranks are counted in sums that a step needs anyway, so a notice costs no message of its own.
"""

import math
from collections.abc import Sequence
from typing import Literal

Decision = Literal["continue", "finish_and_hand_over", "finish_and_save", "hand_over_now", "save_now", "leave_now"]
"""A state is saved to the storage, or handed over in the memory of the nodes to a world that goes on at once.
`..._now`: the step under way is given up before its update; the state of the step before is what is saved."""

URGENCY: tuple[Decision, ...] = ("finish_and_hand_over", "finish_and_save", "hand_over_now", "save_now", "leave_now")
"""The decisions to leave, from calm to urgent: their order is that of the counts."""

GIVE_UP: frozenset[Decision] = frozenset({"hand_over_now", "save_now", "leave_now"})
"""Those that leave the step under way unfinished."""


def decide(
    *,
    seconds_left: float,
    rest_of_step_s: float,
    usual_save_s: float,
    margin: float,
    keep_in: Literal["memory", "storage"] = "storage",
) -> Decision:
    """Return what a rank that has a notice wants all ranks to do.

    Args:
        seconds_left: time until this node is gone; infinite for a planned change.
        rest_of_step_s: usual seconds until the update of the step under way is made; infinite if that is unknown.
        usual_save_s: measured seconds until a state is safe in `keep_in`; 0 if none was saved there yet.
        margin: a save is begun only if `margin` times its usual time is left.
        keep_in: where the state must be safe.
    """
    finish: Decision = "finish_and_hand_over" if keep_in == "memory" else "finish_and_save"
    if math.isinf(seconds_left):
        return finish
    spare_s = seconds_left - margin * usual_save_s
    if spare_s <= 0:
        return "leave_now"
    if spare_s > rest_of_step_s:
        return finish
    return "hand_over_now" if keep_in == "memory" else "save_now"


def agree(counts: Sequence[float]) -> Decision:
    """Return what all ranks do, given how many of them want each of `URGENCY`."""
    wanted: list[Decision] = [decision for decision, count in zip(URGENCY, counts, strict=True) if count > 0]
    return wanted[-1] if wanted else "continue"
