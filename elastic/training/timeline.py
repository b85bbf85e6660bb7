"""One trainer's time, cut into phases that follow each other without a gap, and how long each usually takes."""

import statistics
import time
from collections import defaultdict, deque
from dataclasses import dataclass

from elastic.ports import Observer, Phase

_RECENT = 20
"""Durations of a phase that its usual one is the median of."""


@dataclass(frozen=True, kw_only=True)
class OpenPhase:
    """What a trainer is doing."""

    number: int
    """Counts phases; another number is progress."""
    phase: Phase
    usual_s: float | None
    """The median of the newest durations of this phase; None if it has not ended yet."""


class Timeline:
    """Records phases as they end.

    Args:
        observer: takes each phase that has ended.
        phase: what this trainer has been doing since `start_s` (Unix seconds).
    """

    def __init__(self, observer: Observer, *, phase: Phase, start_s: float) -> None:
        self._observer = observer
        self._start_s = start_s
        self._recent_s: defaultdict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._open = OpenPhase(number=0, phase=phase, usual_s=None)

    @property
    def open(self) -> OpenPhase:
        """What is going on; may be read from any thread."""
        return self._open

    def begin(self, phase: Phase) -> float:
        """End the phase under way and begin the next; return how long the one that ended took, in seconds."""
        now_s = time.time()
        ended, duration_s = self._open, now_s - self._start_s
        self._observer.phase(ended.phase, self._start_s, now_s)
        self._recent_s[ended.phase].append(duration_s)
        self._start_s = now_s
        self._open = OpenPhase(number=ended.number + 1, phase=phase, usual_s=self.get_usual_s(phase))
        return duration_s

    def get_usual_s(self, phase: Phase) -> float | None:
        """Return the median of the phase's newest durations; None if it has not ended yet."""
        recent_s = self._recent_s.get(phase)
        return statistics.median(recent_s) if recent_s else None
