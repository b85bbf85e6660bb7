"""What the trainers of the current world say of it: who they are, how far they are, and what of it is safe."""

import time
from collections.abc import Callable
from typing import Literal, assert_never

from cluster.controller import State
from cluster.runtime import messages as said
from cluster.runtime.coordinator.published import Published
from cluster.runtime.coordinator.records.relayed import RowReceiver
from cluster.runtime.coordinator.records.run_records import RunRecords
from cluster.types import Event, Slot, Stalled, Stepped, TrainerReady, Worker
from elastic.records.rundir import parse_utc


class World:
    """Takes what trainers say, on the serving thread; any thread may read.

    Args:
        disks: whether the nodes have a folder of the run on disks of their own.
        decide: has the controller take an event.
    """

    def __init__(
        self,
        state: State,
        *,
        records: RunRecords,
        out: Published,
        rows: RowReceiver,
        disks: Literal["shared", "own"],
        decide: Callable[[Event], None],
    ) -> None:
        self._state, self._records, self._out, self._rows = state, records, out, rows
        self._disks, self._decide = disks, decide
        self._resumed_step = self._safe_step = 0
        self._pids: dict[Slot, int] = {}
        self.step = 0
        """The newest that the current attempt has applied; 0: none yet."""

    def begin(self) -> None:
        """Forget the trainers of the world before."""
        self._pids, self.step = {}, 0

    def is_safe(self) -> bool:
        """Tell whether the world trains on from a state that outlives every node that is no member of it.

        That is on the storage by now, or in memories of its own.
        """
        state = self._state
        return state.stage == "running" and state.progressed and self._safe_step >= self._resumed_step

    def get_workers(self) -> list[Worker]:
        """Return the members that have said who they are, by rank."""
        pids = dict(self._pids)
        return [
            Worker(rank=rank, node=slot.node, slot=slot.name, pid=pids[slot])
            for rank, slot in enumerate(self._state.members)
            if slot in pids
        ]

    def hear(self, slot: Slot, attempt: int | None, message: said.TrainerMessage) -> None:  # noqa: PLR0912 (a case per message)
        """Take what a trainer of the current attempt says; an older one has nothing to say any more."""
        # of a coordinator before this one, or of a world that is over
        if attempt is None or attempt != self._state.attempt or slot not in self._state.ranks:
            return
        now_s = time.time()
        match message:
            case said.Ready(store_host=host, store_port=port):
                self._pids[slot] = message.pid
                self._decide(TrainerReady(slot=slot, attempt=attempt, store_host=host, store_port=port))
            case said.Stepped():
                self._take_step(slot, attempt, message)
            case said.Progressed(times=times):
                for each in times:
                    self._records.step_times(slot, each.step, each.phases)
            case said.Restored(progress=progress, source=source):
                self._resumed_step = progress.step
                # from a disk of the nodes' own it is not safe: the next ones may not have it
                if source == "remote" or (source == "disk" and self._disks == "shared"):
                    self._mark_safe(progress.step)
                self._records.restored(slot, progress, source, now_s)
            case said.Phases(phases=phases):
                self._records.phases(slot, phases)
            case said.Kept(progress=progress, copied=copied):
                self._mark_safe(progress.step if copied else 0)
            case said.Stalled():
                self._take_stall(slot, attempt, message)
            case said.Committed(progress=progress):
                self._mark_safe(progress.step)
                self._out.say(f"checkpoint of step {progress.step} committed")
            case said.RowWritten() | said.RowsAsked():
                self._rows.take(slot, attempt, message)
            case _:
                assert_never(message)

    def _mark_safe(self, step: int) -> None:
        self._safe_step = max(self._safe_step, step)

    def _take_step(self, slot: Slot, attempt: int, message: said.Stepped) -> None:
        finished_s = parse_utc(str(message.row["time_utc"]))  # however late we hear of it
        if slot == self._state.members[0]:
            self.step = message.progress.step
            self._out.add_row(dict(message.row))
        self._records.stepped(slot, message.progress, message.phases, finished_s)
        self._decide(Stepped(attempt=attempt, progress=message.progress))

    def _take_stall(self, slot: Slot, attempt: int, message: said.Stalled) -> None:
        if slot not in self._state.stalls.by_slot:
            how = "frozen" if message.where == "silent" else message.where
            self._out.say(f"rank {self._state.ranks[slot]} makes no progress for {message.waited_s:.0f} s: {how}")
        self._decide(Stalled(slot=slot, attempt=attempt, step=message.step, where=message.where))
