"""When the next save is due: at fixed steps, or as often as costs the least. No torch here."""

import statistics
import time
from collections import deque
from functools import partial
from typing import Literal

from elastic.checkpoint.interval import SaveCost, plan_every_steps
from elastic.config import CheckpointConfig

Tier = Literal["memory", "storage"]
"""How far a state goes; what goes to the storage is in memory first."""

_RECENT = 20
_LONGEST_UNSAVED_S = 2.5
"""A snapshot is begun so long after the last one at the latest, if that costs training next to nothing:"""
_MOST_SHARE = 0.005
"""of its time."""
_FIRST_COST = SaveCost(stall_s=1.0, busy_s=1.0)
"""What a durable save is taken to cost until one was measured."""
_SHORTEST_STEP_S = 1e-4
_ASSUMED_STEP_S = 1.0


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


class Schedule:
    """The paces of one world's saves, and how long its steps take.

    Args:
        has_memory: snapshots in memory are taken as well.
    """

    def __init__(
        self, config: CheckpointConfig, *, start_step: int, mean_s_between_losses: float, has_memory: bool
    ) -> None:
        pace = partial(Pace, start_step=start_step, mean_s_between_losses=mean_s_between_losses)
        self.memory = pace(
            every_steps=config.memory_every_steps,
            at_first=True,
            first_cost=SaveCost(stall_s=0, busy_s=0),
            longest_s=min(_LONGEST_UNSAVED_S, config.longest_s),
            most_share=_MOST_SHARE,
        )
        self.storage = pace(
            every_steps=config.every_steps, at_first=False, first_cost=_FIRST_COST, longest_s=config.longest_s
        )
        self._has_memory = has_memory
        self.is_agreed = not has_memory and config.every_steps > 0
        """The ranks have agreed on intervals, or need none."""
        self._step_s: deque[float] = deque(maxlen=_RECENT)
        self._stepped_s: float | None = None

    def stepped(self) -> None:
        """Take that a step has ended."""
        now_s = time.monotonic()
        if self._stepped_s is not None:
            self._step_s.append(now_s - self._stepped_s)
        self._stepped_s = now_s

    @property
    def step_s(self) -> float:
        """The usual seconds of a step."""
        return max(statistics.median(self._step_s), _SHORTEST_STEP_S) if self._step_s else _ASSUMED_STEP_S

    def get_due(self, step: int) -> Tier | None:
        """Return where the state after this step shall go, if anywhere."""
        if self.storage.is_due(step):
            return "storage"
        return "memory" if self._has_memory and self.memory.is_due(step) else None

    def started(self, tier: Tier, step: int) -> None:
        """Take a save that was started; one to the storage is a snapshot in memory as well."""
        self.memory.started(step)
        if tier == "storage":
            self.storage.started(step)

    def agree(self, *, memory_every_steps: int, storage_every_steps: int) -> None:
        """Take the longest plans of all ranks."""
        self.memory.agree(memory_every_steps)
        self.storage.agree(storage_every_steps)
        self.is_agreed = True
