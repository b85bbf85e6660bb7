"""When state is saved, and what is left of the work after a loss: the rhythm between two changes of a world. Pure.

Work is counted in node-seconds. Training for T and saving for d are repeated; after a time that is not a whole number
of them, what followed the last save is what a loss takes.
"""

from dataclasses import dataclass, field
from typing import Literal

from elastic.checkpoint.interval import estimate_mean_s_between_losses, get_best_interval_s

Kind = Literal["fixed", "young", "jit", "memory"]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A way to save."""

    name: str
    kind: Kind
    save_s: float
    """How long a save holds training up."""
    recovery_s: float
    """From a loss to the next step."""
    planned_s: float | None = None
    """The same for a change that was planned: growth, a node with notice. None: as a loss."""
    interval_s: float = 1800.0
    """fixed, memory: between two saves."""
    durable_s: float = 600.0
    """memory, jit: so much work the storage lacks, for the day on which all who have it go together."""
    unsaved_s: float | None = None
    """memory: so much training is lost each time, where that was measured; None: what followed the last save."""
    park_s: float = 2.0
    """A world that is asked to leaves after so long, before `planned_s`. Measured on two H200: up to 2 s."""
    leave_s: float = 0.5
    """Survivors of a loss are out of their world after so long, before `recovery_s`; who goes together goes within
    it."""

    def get_outage_s(self) -> float:
        """Return how long a loss holds up: with jit the survivors save first."""
        return self.recovery_s + (self.save_s if self.kind == "jit" else 0.0)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What came of a time in which a world trained."""

    worked_s: float
    saved_s: float
    """Time that saves took."""
    kept_s: float
    """Of the work, what the last finished save has."""


@dataclass(kw_only=True)
class Rhythm:
    """The interval that is kept to, learned from the losses so far as a run does."""

    saving: Saving
    assumed_s: float = 3600.0
    """Between two losses, until more is known."""
    observed_s: float = 0.0
    num_losses: int = 0
    _interval_s: float | None = field(default=None)

    def lost(self) -> None:
        """Take that there was a loss."""
        self.num_losses += 1
        self._interval_s = None

    def observed(self, seconds: float) -> None:
        """Take that so much time has passed in which there could have been one."""
        self.observed_s += seconds
        self._interval_s = None

    @property
    def interval_s(self) -> float:
        """Seconds of work between two saves; infinite if there are none between losses."""
        if self._interval_s is None:
            self._interval_s = self._plan()
        return self._interval_s

    def _plan(self) -> float:
        if self.saving.kind == "jit":
            return float("inf")
        if self.saving.kind in ("fixed", "memory"):
            return self.saving.interval_s
        mean_s = estimate_mean_s_between_losses(
            assumed_s=self.assumed_s, observed_s=self.observed_s, num_losses=self.num_losses
        )
        return max(1.0, get_best_interval_s(cost_s=self.saving.save_s, mean_s_between_losses=mean_s))

    def divide(self, seconds: float) -> Stretch:
        """Return what a stretch of so many seconds is made of."""
        if self.saving.kind == "jit":
            return Stretch(worked_s=seconds, saved_s=0.0, kept_s=seconds)
        if self.saving.unsaved_s is not None:
            return Stretch(worked_s=seconds, saved_s=0.0, kept_s=max(0.0, seconds - self.saving.unsaved_s))
        interval_s, save_s = self.interval_s, self.saving.save_s
        if self.saving.kind == "memory":  # beside the training
            save_s = 0.0
        rounds, rest_s = divmod(seconds, interval_s + save_s)
        worked_s = rounds * interval_s + min(rest_s, interval_s)
        return Stretch(worked_s=worked_s, saved_s=seconds - worked_s, kept_s=rounds * interval_s)
