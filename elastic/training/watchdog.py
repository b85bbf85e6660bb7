"""Notices that a trainer makes no progress any more: a thread beside the training loop, which only looks.

What counts is that one phase of the timeline follows another, not that the process lives: a trainer that waits in a
collective for a peer that will never come is as alive as any. Each phase has a limit: a floor from the configuration,
or a few times what this phase has usually taken. Whether the main thread waits in a collective is read off its stack:
no call has to be wrapped, and those that FSDP2 makes inside a backward count as well.
"""

import faulthandler
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

from elastic.awake import AwakeClock
from elastic.config import FaultConfig
from elastic.ports import Observer, Phase, Stall, Where
from elastic.training.timeline import OpenPhase, Timeline

LOOK_EVERY_S = 0.5
_ALIVE_EVERY_S = 1.0
_IN_PHASE: dict[Phase, Where] = {
    "load": "loading a checkpoint",
    "data": "loading data",
    "eval": "computing",
    "save": "saving",
    "train": "computing",
}


def get_limit_s(open_phase: OpenPhase, fault: FaultConfig) -> float:
    """Return how long a phase may take before it counts as hung: infinite if the watchdog is off."""
    if fault.hang_factor == 0:
        return float("inf")
    if open_phase.phase == "train" and open_phase.usual_s is None:
        return fault.hang_first_step_s
    floors_s: dict[Phase, float] = {
        "load": fault.hang_load_s,
        "data": fault.hang_data_s,
        "train": fault.hang_step_s,
        "eval": fault.hang_eval_s,
        "save": fault.hang_save_s,
    }
    return max(floors_s[open_phase.phase], fault.hang_factor * (open_phase.usual_s or 0.0))


def locate(stack: Sequence[tuple[str, str]], phase: Phase) -> Where:
    """Say what a thread is doing.

    Args:
        stack: (file, function) of each frame, innermost first.
    """
    file, function = stack[0]
    if "torch/distributed/" in file:
        return "in a collective"
    if function in ("_engine_run_backward", "synchronize") or file.endswith("elastic/checkpoint/consensus.py"):
        return "waiting"
    if any("elastic/sinks/" in file or file.endswith("elastic/records/rundir.py") for file, _ in stack):
        return "writing its rows"
    if function in ("train_step", "eval_loss", "read") and file.endswith("elastic/training/step.py"):
        return "waiting"  # for a number from the device, which may wait for a collective; on a CPU: for a moment
    return _IN_PHASE[phase]


class Watchdog:
    """Watches a timeline while in a `with` block, which the thread to watch enters.

    Time in which this process did not run (it was stopped, or its machine slept) is not counted.

    Args:
        observer: hears a sign of life every second, and of a stall every time we look, both from a thread of ours.
    """

    def __init__(self, timeline: Timeline, observer: Observer, *, fault: FaultConfig) -> None:
        self._timeline = timeline
        self._observer = observer
        self._fault = fault
        self._watched = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        clock = AwakeClock()
        number, began_s, alive_s, has_dumped = -1, 0.0, 0.0, False
        self._observer.alive()
        while not self._end.wait(LOOK_EVERY_S):
            now_s, open_phase = clock.get_s(), self._timeline.open
            if open_phase.number != number:
                number, began_s, has_dumped = open_phase.number, now_s, False
            waited_s = now_s - began_s
            if now_s - alive_s >= _ALIVE_EVERY_S:
                alive_s = now_s
                self._observer.alive()
            if waited_s > get_limit_s(open_phase, self._fault):
                where = locate(_get_stack(self._watched), open_phase.phase)
                if not has_dumped:
                    has_dumped = True
                    _dump_stacks(f"no progress for {waited_s:.0f} s, {where}; the stacks of all threads:")
                self._observer.stalled(Stall(phase=open_phase.phase, where=where, waited_s=waited_s))


def _get_stack(thread: int) -> list[tuple[str, str]]:
    stack: list[tuple[str, str]] = []
    frame: FrameType | None = sys._current_frames()[thread]  # pyright: ignore[reportPrivateUsage] # the only way
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    return stack


def _dump_stacks(why: str) -> None:
    log = sys.__stderr__
    if log is not None:
        print(why, file=log, flush=True)
        faulthandler.dump_traceback(log, all_threads=True)
