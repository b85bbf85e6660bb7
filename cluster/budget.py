"""When a run has cost enough: warn, then save and leave before a limit is passed, never after. Pure."""

from dataclasses import dataclass

from elastic.config import BudgetConfig


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has taken, over all its attempts."""

    usd: float
    usd_per_s: float
    """At this moment, for all nodes that are paid."""
    usd_per_s_at_most: float
    """If all nodes came that the run may use."""
    hours: float
    """Since its first attempt began."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done about it."""

    warning: str = ""
    leave: str = ""
    """Why the run must save and end now; empty: it need not."""


def judge(budget: BudgetConfig, spent: Spent, *, leave_s: float) -> Verdict:
    """Return whether to warn or to leave.

    Args:
        leave_s: what it takes at most to save and to end.
    """
    usd_then, hours_then = (
        spent.usd + max(spent.usd_per_s, spent.usd_per_s_at_most) * leave_s,
        spent.hours + leave_s / 3600,
    )
    if budget.max_usd and usd_then >= budget.max_usd:
        return Verdict(
            leave=f"budget.max_usd={budget.max_usd:g} would be passed: {spent.usd:.4f} USD are spent, at "
            f"{3600 * spent.usd_per_s:.2f} an hour. Raise it, and the same command goes on"
        )
    if budget.max_hours and hours_then >= budget.max_hours:
        return Verdict(
            leave=f"budget.max_hours={budget.max_hours:g} would be passed: the run began {spent.hours:.2f} h ago. "
            "Raise it, and the same command goes on"
        )
    warnings: list[str] = []
    if budget.max_usd and spent.usd >= budget.warn_at * budget.max_usd:
        left_h = (budget.max_usd - spent.usd) / spent.usd_per_s / 3600 if spent.usd_per_s else float("inf")
        warnings.append(f"{spent.usd:.4f} of budget.max_usd={budget.max_usd:g} are spent; {left_h:.2f} h are left")
    if budget.max_hours and spent.hours >= budget.warn_at * budget.max_hours:
        warnings.append(f"{spent.hours:.2f} of budget.max_hours={budget.max_hours:g} are over")
    return Verdict(warning="; ".join(warnings))
