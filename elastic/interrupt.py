"""What to do about a notice: pure, so that every rank that knows the same numbers decides the same."""

from typing import Literal

Decision = Literal["continue", "save_and_leave", "leave_now"]


def decide(*, has_notice: bool, seconds_left: float, usual_save_s: float, margin: float) -> Decision:
    """Return what all ranks do after the current step.

    Args:
        seconds_left: time until the first node is gone; infinite for a planned change.
        usual_save_s: measured seconds that a checkpoint takes until it is durable; 0 if none was made yet.
        margin: a save is begun only if `margin` times its usual time is left.
    """
    if not has_notice:
        return "continue"
    return "save_and_leave" if seconds_left > margin * usual_save_s else "leave_now"
