"""What the coordinator writes down: attempts, incidents, and the ledger of every paid second.

One thread writes: the one that serves hosts, and once that has ended the one that closes the run. Others read what it
published. It never waits for the storage: rows are given to who appends them, and what an earlier coordinator left is
fetched by a job.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.controller import MEMBER_PHASES, State
from cluster.controller.failures import Failures, read_failures
from cluster.cost import get_usd_per_mtoken
from cluster.ledger import Ledger, read_ledger
from cluster.types import DRIVER_GONE, AttemptEnded, AttemptStarted, Change, Slot
from elastic.checkpoint.interval import estimate_mean_s_between_losses
from elastic.config import RunConfig
from elastic.config_load import dump
from elastic.ports import Phase, Progress, Source
from elastic.records.attempts import AttemptRow, History, build_row, close_torn_attempts, read_history
from elastic.records.rundir import RunDir, append_row, end_torn_line, parse_utc, read_rows

FLUSH_EVERY_S = 2.0
_COORDINATOR_GONE = "its coordinator died"
_HEAD_GONE = "its head was lost, and with it whoever could have said why it ended"
_FLUSH_BEHIND_S = 5.0
"""Rows end this long before now, so that what trainers tell about that time is in."""


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """What the files of a run say once the world of the coordinator before is over."""

    history: History
    last: Mapping[str, Any] | None
    """The newest row of the attempts; None: nothing was lost."""
    lost_s: float
    """When that coordinator was found dead."""


@dataclass(kw_only=True)
class _Attempt:
    """The current attempt, as far as it has come."""

    started: AttemptStarted
    start_s: float
    before: History
    speakers: frozenset[Slot]
    """The first member of each node; the node's other trainers do the same as that one."""
    resumed_step: int = 0
    resumed_from: Source | None = None
    go_s: float | None = None
    """When all its trainers were ready and were told their places."""
    restored_s: float | None = None
    first_step_s: float | None = None
    last_step: int = 0


@dataclass(kw_only=True)
class RunRecords:
    """Keeps the three files of one run; see `open_run_records`."""

    run_dir: RunDir
    config: RunConfig
    ledger: Ledger
    history: History
    """What all attempts have done up to now."""
    failures: Failures
    """What earlier submissions leave of the run's budgets."""
    tokens: int
    began_s: float | None
    """When the first attempt of all began; None: none has."""
    append: Callable[[Path, Mapping[str, object]], None]
    """Has a row written."""
    incidents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    check_lead: Callable[[], None] = lambda: None
    """Raises if another process leads this run by now."""
    _attempt: _Attempt | None = None
    lost_s: float | None = None
    """When the coordinator before this one was found dead; None once its world is recorded, or if there was none."""
    _ended: AttemptEnded | None = None
    """The change that led to the current attempt, until its first step shows what it cost."""
    _ended_size: int = 0
    """How many workers were in the world that it ended."""
    _left_s: float = 0.0
    """When the last trainer of the attempt before was out of it."""
    num_losses: int = 0
    """Worlds that were lost without notice, over the life of the run."""
    observed_s: float = 0.0
    """Seconds in which that could have happened."""
    _flushed_s: float = 0.0
    _published: Mapping[str, Any] = field(default_factory=dict[str, Any])

    # ---- nodes

    def join(self, node: str, now_s: float, *, gpus: int, usd_per_gpu_hour: float) -> None:
        """Open the account of a node."""
        self.ledger.join(node, now_s, gpus=gpus, usd_per_gpu_hour=usd_per_gpu_hour)

    def leave(self, node: str, now_s: float) -> None:
        """Close the account of a node that is gone."""
        self.ledger.leave(node, now_s)

    def host_ready(self, node: str, now_s: float) -> None:
        """Record that a node could train from now on."""
        if self.ledger.is_open(node):
            self.ledger.switch(node, "wait", now_s)

    def host_gone(self, node: str, now_s: float) -> None:
        """Record that a node cannot train any more, though it may still be paid for."""
        if self.ledger.is_open(node):
            self.ledger.switch(node, "idle", now_s)

    def staged(self, state: State, now_s: float) -> None:
        """Record what a new stage means for every node with a living host: those of the world change, others wait."""
        member_state = MEMBER_PHASES[state.stage]
        if state.stage == "running" and self._attempt:
            self._attempt.go_s = now_s
        members = {slot.node for slot in state.members}
        for node in filter(self.ledger.is_open, {slot.node for slot in state.claims}):
            is_out = node in state.draining and state.stage not in ("running", "parking")
            waiting: Phase = "idle" if is_out or state.stage == "done" else "wait"
            self.ledger.switch(node, waiting if is_out or node not in members else member_state, now_s)

    # ---- attempts

    def attempt_started(self, action: AttemptStarted, now_s: float) -> None:
        """Begin the row of an attempt."""
        self.history = replace(self.history, attempt=action.attempt)
        self.began_s = now_s if self.began_s is None else self.began_s
        first = {slot.node: slot for slot in reversed(action.members)}
        speakers = frozenset(first.values())
        self._attempt = _Attempt(started=action, start_s=now_s, before=self.history, speakers=speakers)

    def restored(self, slot: Slot, progress: Progress, source: Source, now_s: float) -> None:
        """Record where the attempt starts from."""
        attempt = self._attempt
        if attempt is None or slot != attempt.started.members[0]:
            return
        attempt.resumed_step, attempt.resumed_from, attempt.restored_s = progress.step, source, now_s
        attempt.last_step = progress.step

    def stepped(
        self, slot: Slot, progress: Progress, phases: Sequence[tuple[Phase, float, float]], finished_s: float
    ) -> None:
        """Record a step that one trainer finished, at the time that its row names, and the time since its last one."""
        attempt = self._attempt
        if attempt is None:
            return
        self.step_times(slot, progress.step, phases)
        if slot != attempt.started.members[0]:
            return
        attempt.last_step = progress.step
        if attempt.first_step_s is None:
            attempt.first_step_s = finished_s
            self._book_incident(attempt)
        best = max(self.history.step, progress.step)
        self.history = replace(self.history, step=best, last_step=progress.step, last_step_s=finished_s)
        self.tokens = max(self.tokens, progress.tokens)

    def step_times(self, slot: Slot, step: int, phases: Sequence[tuple[Phase, float, float]]) -> None:
        """Record what time went into up to the end of a step, as the first trainer of a node tells it."""
        attempt = self._attempt
        if attempt is None:
            return
        before = attempt.before.step
        is_redone = step <= before
        self.phases(slot, [("redo" if is_redone and phase == "train" else phase, a, b) for phase, a, b in phases])
        if phases and self._speaks_for_node(slot):  # until the next step is told
            self.ledger.switch(slot.node, "redo" if step < before else "train", phases[-1][2])

    def phases(self, slot: Slot, phases: Sequence[tuple[Phase, float, float]]) -> None:
        """Record stretches of time that the first trainer of a node tells."""
        if self._speaks_for_node(slot):
            for phase, start_s, end_s in phases:
                self.ledger.report(slot.node, phase, start_s, end_s)

    def _speaks_for_node(self, slot: Slot) -> bool:
        """Tell whether a slot is the first of its node in the current world."""
        return self._attempt is not None and slot in self._attempt.speakers and self.ledger.is_open(slot.node)

    def attempt_ended(self, action: AttemptEnded, now_s: float) -> None:
        """Write the row of an attempt."""
        attempt, self._attempt, self._ended, self._left_s = self._attempt, None, action, now_s
        assert attempt is not None
        self._ended_size = len(action.members)
        self.observed_s += now_s - attempt.start_s
        self.num_losses += action.kind == "lost"
        self.append(self.run_dir.attempts, asdict(_build_row(attempt, action, now_s)))

    def fetch_inherited(self) -> Inherited | None:
        """Complete and return what the coordinator before this one left; None if it was fetched, or there was none.

        By now, not earlier, the trainers of its world are out of it. For a thread that may wait for the storage.
        """
        lost_s, self.lost_s = self.lost_s, None
        if lost_s is None:
            return None
        try:
            self.check_lead()
            close_torn_attempts(self.run_dir, reason=_COORDINATOR_GONE, change="coordinator_lost")
            last = next(iter(deque(read_rows(self.run_dir.attempts), maxlen=1)), None)
            return Inherited(history=read_history(self.run_dir), last=last, lost_s=lost_s)
        except BaseException:
            self.lost_s = lost_s  # to be fetched again
            raise

    def record_inherited(self, inherited: Inherited | None, now_s: float) -> None:
        """Record the world of the coordinator before this one."""
        if inherited is None:
            return
        self.history, last = inherited.history, inherited.last
        if last is None:
            return
        self._ended_size, self._left_s = last["world_size"], now_s
        self.num_losses += last.get("change") == "coordinator_lost"
        self._ended = AttemptEnded(
            attempt=last["attempt"],
            members=(),
            change="coordinator_lost",
            reason=_COORDINATOR_GONE,
            cause=None,
            noticed_s=inherited.lost_s,
        )

    def inherit(self, last: Mapping[str, Any], now_s: float) -> None:
        """Have the loss of head or driver that ended the last attempt recorded, once the next one has a step."""
        change: Change | None = "head_lost" if last.get("change") == "head_lost" else None
        if last["end"] == "interrupted" and last["reason"].startswith(DRIVER_GONE):
            change = "driver_lost"
        if change is None:
            return
        self._ended_size, self._left_s = last["world_size"], parse_utc(last["end_utc"])
        self._ended = AttemptEnded(
            attempt=last["attempt"], members=(), change=change, reason=last["reason"], cause=None, noticed_s=now_s
        )

    def _book_incident(self, attempt: _Attempt) -> None:
        """Write down the change before this attempt, now that its first step tells what it cost."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        row = _build_row(attempt, ended, attempt.first_step_s or 0.0)
        incident = {
            "kind": ended.change,
            "node": ended.cause,
            "noticed_s": round(ended.noticed_s, 3) if ended.kind == "interrupted" else None,
            "detected_s": round(ended.noticed_s, 3),
            "outage_s": row.outage_s,
            "lost_steps": row.lost_steps,
            "resumed_from": row.resumed_from,
            "world": f"{self._ended_size} -> {len(attempt.started.members)}",
            "step": row.first_step,
            "phases_s": self._split_outage(attempt, ended),
        }
        self.incidents.append(incident)
        self.append(self.run_dir.incidents, incident)

    def _split_outage(self, attempt: _Attempt, ended: AttemptEnded) -> dict[str, float]:
        """Return what the seconds between the last step before and the first step after went into; they add up.

        `detect` ends when the change is known, `leave` when the last trainer is out of the old world, `gather` when
        there are enough workers for the next, `form` when all of them have a store and know their places, `load` when
        the state is there.
        """
        ends_s = {
            "detect": ended.noticed_s,
            "leave": self._left_s,
            "gather": attempt.start_s,
            "form": attempt.go_s,
            "load": attempt.restored_s,
            "first_step": attempt.first_step_s,
        }
        at_s = attempt.before.last_step_s or self._left_s
        most_s = max(at_s, attempt.first_step_s or at_s)
        split: dict[str, float] = {}
        for phase, end_s in ends_s.items():
            # steps end by the clock of rank 0, all else when we hear of it, which may be later than the step after
            until_s = min(max(at_s, end_s or at_s), most_s)
            split[phase], at_s = round(until_s - at_s, 3), until_s
        return split

    def estimate_mean_s_between_losses(self, assumed_s: float) -> float:
        """Return the expected seconds between two losses without notice, from an assumption and what was seen."""
        return estimate_mean_s_between_losses(
            assumed_s=assumed_s, observed_s=self.observed_s, num_losses=self.num_losses
        )

    # ---- money

    def flush(self, now_s: float) -> None:
        """Write the ledger's rows, every few seconds."""
        if now_s - self._flushed_s >= FLUSH_EVERY_S:
            self._flushed_s = now_s
            self._write_ledger(now_s - _FLUSH_BEHIND_S)

    def close(self, now_s: float) -> None:
        """Stop to pay and give away the rows that are left."""
        self.record_inherited(self.fetch_inherited(), now_s)
        for node in self.ledger.get_open():
            self.ledger.leave(node, now_s)
        self._write_ledger(now_s)
        self.publish()

    def _write_ledger(self, up_to_s: float) -> None:
        for row in self.ledger.flush(up_to_s):
            self.append(self.run_dir.ledger, row.to_row())

    def publish(self) -> None:
        """Have `summary` return how things are now."""
        totals = self.ledger.totals()
        self._published = {
            "usd": totals.usd,
            "usd_per_mtoken": get_usd_per_mtoken(totals.usd, self.tokens),
            "usd_wasted": totals.usd_by_cause,
            "goodput": totals.goodput,
            "available_goodput": totals.available_goodput,
            "paid_gpu_s": totals.paid_gpu_s,
            "gpu_s": {state: ms / 1000 for state, ms in totals.gpu_ms.items()},
            "incidents": list(self.incidents),
            "best_step": self.history.step,
            "num_nodes": len(self.ledger.get_open()),
        }

    def summary(self) -> dict[str, Any]:
        """Return what the driver shows: money so far, goodput, incidents. Any thread may ask."""
        return dict(self._published)


def _build_row(attempt: _Attempt, ended: AttemptEnded, now_s: float) -> AttemptRow:
    return build_row(
        attempt.before,
        attempt=attempt.started.attempt,
        world_size=len(attempt.started.members),
        nodes=sorted({slot.node for slot in attempt.started.members}),
        start_s=attempt.start_s,
        end_s=now_s,
        end=ended.kind,
        reason=ended.reason,
        change=ended.change,
        cause=ended.cause,
        denied=ended.denied,
        resumed_from=attempt.resumed_from,
        resumed_step=attempt.resumed_step,
        last_step=attempt.last_step,
        first_step_s=attempt.first_step_s,
    )


def open_run_records(
    run_root: str,
    config: RunConfig,
    *,
    check_lead: Callable[[], None] = lambda: None,
    append: Callable[[Path, Mapping[str, object]], None] = append_row,
    lost_s: float | None = None,
) -> RunRecords:
    """Open the run records of a run, new or old; what a killed writer left unsaid is completed.

    Args:
        check_lead: raises if another one leads the run by now.
        append: has a row written, by whoever may wait for the storage.
        lost_s: when the coordinator before this one was found dead (Unix seconds), if its world may still train: that
            is recorded when the next one starts.
    """
    run_dir = RunDir(Path(run_root))
    run_dir.root.mkdir(parents=True, exist_ok=True)
    run_dir.config.write_text(dump(config))
    if lost_s is None:
        close_torn_attempts(run_dir, reason=_HEAD_GONE, change="head_lost")
    for path in (run_dir.ledger, run_dir.incidents):
        end_torn_line(path)
    history = read_history(run_dir)
    attempts = list(read_rows(run_dir.attempts))
    failures = read_failures(attempts)
    records = RunRecords(
        run_dir=run_dir,
        config=config,
        ledger=Ledger(read_ledger(read_rows(run_dir.ledger))),
        history=history,
        append=append,
        check_lead=check_lead,
        lost_s=lost_s,
        failures=replace(failures, best_step=max(failures.best_step, history.step)),
        num_losses=sum(row["end"] == "lost" for row in attempts),
        observed_s=sum(parse_utc(row["end_utc"]) - parse_utc(row["start_utc"]) for row in attempts),
        tokens=max((row["tokens"] for row in read_rows(run_dir.metrics)), default=0),
        began_s=min((parse_utc(row["start_utc"]) for row in attempts), default=None),
    )
    if lost_s is None and attempts:
        records.inherit(attempts[-1], time.time())
    records.publish()
    return records
