"""What a trainer tells of its training, over the link to its host. No torch here."""

import time
from collections.abc import Callable, Mapping

from cluster.runtime.messages import (
    Alive,
    Committed,
    Kept,
    Phases,
    PhaseTimes,
    Progressed,
    Restored,
    Stalled,
    Stepped,
    StepTimes,
)
from cluster.runtime.trainers.forked import OrderLink
from elastic.ports import Phase, Progress, Source, Stall

TELL_EVERY_S = 1.0
"""Less than the run records wait for what trainers tell (`run_records._FLUSH_BEHIND_S`)."""


class LinkObserver:
    """Sends what happens in training up the link: from rank 0 one message per step, from others a few per second.

    All ranks do the same steps, and one coordinator hears them all.

    Args:
        on_restored: called once the world has formed and has its state.
        now_s: a monotonic time.
    """

    def __init__(
        self,
        link: OrderLink,
        *,
        rank: int,
        local_rank: int,
        on_restored: Callable[[], object],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._rank, self._speaks_for_node = rank, local_rank == 0
        self._on_restored = on_restored
        self._now_s = now_s
        self._step = self._num_steps = 0
        self._phases: list[tuple[Phase, float, float]] = []
        self._times: list[StepTimes] = []
        """Of steps that were not told yet."""
        self._told_s = -float("inf")

    def phase(self, phase: Phase, start_s: float, end_s: float) -> None:
        """Keep a stretch of time for the next message; loading and saving are told at once."""
        if not self._speaks_for_node:
            return
        self._phases.append((phase, start_s, end_s))
        if phase in ("load", "save"):
            self._link.send(Phases(phases=self._take_phases()))

    def restored(self, progress: Progress, source: Source) -> None:
        """Tell where this attempt starts from."""
        self._step = progress.step
        self._on_restored()
        self._link.send(Restored(progress=progress, source=source))

    def stepped(self, progress: Progress, row: Mapping[str, object]) -> None:
        """Tell a finished step, with the time since the last one; unless this is rank 0, together with those after."""
        self._step = progress.step
        self._num_steps += 1
        if self._rank == 0:
            self._link.send(Stepped(progress=progress, row=dict(row), phases=self._take_phases()))
            return
        if self._speaks_for_node:
            self._times.append(StepTimes(step=progress.step, phases=self._take_phases()))
        if self._now_s() >= self._told_s + TELL_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Tell the steps that were not told yet."""
        if self._rank == 0 or not self._num_steps:
            return
        self._told_s = self._now_s()
        times, self._times = tuple(self._times), []
        self._link.send(Progressed(num_steps=self._num_steps, step=self._step, times=times))

    def committed(self, progress: Progress) -> None:
        """Tell a checkpoint that became visible."""
        self._link.send(Committed(progress=progress))

    def kept(self, progress: Progress, *, copied: bool) -> None:
        """Tell a snapshot that is in memory on all ranks."""
        self._link.send(Kept(progress=progress, copied=copied))

    def alive(self) -> None:
        """Let the host know that this process is not frozen."""
        self._link.send(Alive())

    def stalled(self, stall: Stall) -> None:
        """Tell that there is no progress; the coordinator knows what the others say and ends the world if it must."""
        self._link.send(Stalled(step=self._step, where=stall.where, waited_s=stall.waited_s))

    def _take_phases(self) -> PhaseTimes:
        phases, self._phases = tuple(self._phases), []
        return phases
