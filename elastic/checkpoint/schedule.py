"""When the next save of one kind is due: at fixed steps, or as often as costs the least. No torch here."""

import statistics
from collections import deque

from elastic.checkpoint.interval import SaveCost, plan_every_steps

_RECENT = 20


class Pace:
    """The rhythm of one kind of save; all ranks that are told the same answer the same.

    Args:
        every_steps: save after each so many steps. 0: plan it.
        at_first: the first save comes after the first step; else after the first interval.
        first_cost: what a save is taken to cost until one was measured.
        longest_s: a planned interval is never longer, unless saves took more than their share then.
        most_share: of the time of training that saves may take to be so frequent.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        start_step: int,
        at_first: bool,
        first_cost: SaveCost,
        mean_s_between_losses: float,
        longest_s: float,
        most_share: float = 1.0,
    ) -> None:
        self._most_share = most_share
        self._every_steps = every_steps
        self._last_step: int | None = None if at_first else start_step
        self._costs: deque[SaveCost] = deque([first_cost], maxlen=_RECENT)
        self._is_measured = False
        self._mean_s = mean_s_between_losses
        self._longest_s = longest_s
        self._agreed_steps: int | None = None

    def is_due(self, step: int) -> bool:
        """Tell whether to save after this step."""
        if self._last_step is None:
            return True
        if self._every_steps:
            return step % self._every_steps == 0
        return self._agreed_steps is not None and step - self._last_step >= self._agreed_steps

    def started(self, step: int) -> None:
        """Take a save that was started."""
        self._last_step = step

    def measured(self, cost: SaveCost) -> None:
        """Take what a save has cost on this rank."""
        if not self._is_measured:
            self._costs.clear()
            self._is_measured = True
        self._costs.append(cost)

    def plan(self, step_s: float) -> int:
        """Return after how many steps this rank would save again."""
        cost = SaveCost(
            stall_s=statistics.median(cost.stall_s for cost in self._costs),
            busy_s=statistics.median(cost.busy_s for cost in self._costs),
        )
        longest_s = max(self._longest_s, cost.stall_s / self._most_share)
        return plan_every_steps(cost=cost, step_s=step_s, mean_s_between_losses=self._mean_s, longest_s=longest_s)

    def agree(self, every_steps: int) -> None:
        """Take the longest plan of all ranks."""
        self._agreed_steps = every_steps
