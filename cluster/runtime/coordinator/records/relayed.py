"""A run's rows on their way to the one process that writes them, where the storage is an object store.

Whole files go to an object store, so each needs one writer: the coordinator, in the run's spool. Trainers send it each
row as it comes, numbered by file, and keep it until they know that it is in the storage. Before a checkpoint is
committed, on the thread that saves it, each trainer asks for that and waits; rows that the coordinator does not have,
because it is another one by now, are sent again.
"""

import logging
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.runtime.coordinator.background import Background
from cluster.runtime.messages import RowsAsked, RowsKept, RowWritten
from cluster.types import Slot
from elastic.checkpoint.durable.storage_errors import explain
from elastic.errors import SolventError, StorageError
from elastic.ports import MetricSink
from elastic.records.fencing import GenerationGuard
from elastic.records.rundir import append_row, end_torn_line, read_rows
from elastic.records.spool import OpenRun, SpooledRun
from elastic.storage import Storage

logger = logging.getLogger(__name__)

ANSWER_S = 150.0
"""A storage that fails is tried for a minute, once by its client and once by us, before the coordinator says so."""
_MOST_ASKS = 3


Send = Callable[[RowWritten | RowsAsked], object]
"""Sends one message; see `Link.send`."""


# ---- a trainer's side


@dataclass(kw_only=True)
class Stream:
    """The rows of one file in one world, as far as they are not known to be safe."""

    num_kept: int = 0
    """The first ones, which are in the storage."""
    unkept: deque[Mapping[str, object]] = field(default_factory=deque[Mapping[str, object]])


Streams = dict[tuple[int, str], Stream]
"""By attempt and file."""


class RelayedRun(SpooledRun):
    """One rank's view of a run in one world. Files that are not made of rows go to the storage from a folder here.

    Args:
        folder: does not exist yet.
        attempt: number of the world.
        streams: of this process, from world to world: what one did not find safe is sent again in the next, because a
            coordinator that has followed another never heard what was said in between.
        answers: what the coordinator says about rows.
    """

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        *,
        attempt: int,
        streams: Streams,
        send: Send,
        answers: "queue.SimpleQueue[RowsKept]",
        answer_s: float = ANSWER_S,
    ) -> None:
        folder.mkdir(parents=True)
        super().__init__(storage, folder)
        self._send = send
        self._answers = answers
        self._answer_s = answer_s
        self._attempt = attempt
        self._streams = streams
        self._sending = threading.Lock()
        self._asking = threading.Lock()
        self._num_asks = 0
        for key in list(streams):
            self._send_again(key)
            if not streams[key].unkept:
                del streams[key]

    def append(self, path: Path, row: Mapping[str, object]) -> None:
        """Send a row; it is held until `push` has found it in the storage."""
        with self._sending:
            stream = self._streams.setdefault((self._attempt, path.name), Stream())
            stream.unkept.append(row)
            number = stream.num_kept + len(stream.unkept)
            self._send(RowWritten(attempt=self._attempt, file=path.name, number=number, row=row))

    def fence(self, sink: MetricSink, guard: GenerationGuard) -> MetricSink:  # noqa: ARG002 (see `OpenRun`)
        """Return the sink: the coordinator, which writes the row, looks, and no step waits for the store's answer."""
        return sink

    def push(self) -> None:
        """Return when all rows so far are in the storage.

        Raises:
            StorageError: they are not, or nobody says so.
        """
        super().push()
        with self._asking:
            wanted = self._count_unkept()
            for _ in range(_MOST_ASKS):
                if not wanted:
                    return
                kept = self._ask(wanted)
                self._take(kept)
                wanted = {key: number for key, number in wanted.items() if kept.get(key, 0) < number}
        if wanted:
            files = ", ".join(sorted({file for _, file in wanted}))
            raise StorageError(
                f"storage: rows of {files} were sent to the run's coordinator {_MOST_ASKS} times "
                "and are not there, so nothing new is committed; checkpoints committed before are unharmed. Look at "
                "the head's log, then start the same command again: it resumes."
            )

    def close(self) -> None:
        """Bring the files of this rank to the storage, if there are any; all rows are on their way already."""
        try:
            super().push()
        except OSError as error:
            logger.warning("files of this rank could not be brought to %s: %s", self.storage.url, error)
        shutil.rmtree(self.dir.root, ignore_errors=True)

    def _count_unkept(self) -> dict[tuple[int, str], int]:
        with self._sending:
            return {key: s.num_kept + len(s.unkept) for key, s in self._streams.items() if s.unkept}

    def _ask(self, wanted: Mapping[tuple[int, str], int]) -> Mapping[tuple[int, str], int]:
        """Return how many rows of each stream are in the storage."""
        self._num_asks += 1
        self._send(RowsAsked(ask=self._num_asks, streams=tuple(wanted)))
        while True:
            try:
                answer = self._answers.get(timeout=self._answer_s)
            except queue.Empty:
                raise StorageError(
                    f"storage: the run's coordinator did not say within {self._answer_s:.0f} s that the rows up to "
                    "this checkpoint are safe, so nothing new is committed; checkpoints committed before are unharmed. "
                    "Look at the head and at the storage; the next save asks again."
                ) from None
            if answer.ask == self._num_asks:  # an older one came too late
                break
        if answer.problem:
            raise StorageError(answer.problem)
        return {(attempt, file): number for attempt, file, number in answer.kept}

    def _take(self, kept: Mapping[tuple[int, str], int]) -> None:
        """Forget the rows that are safe, and send all others again: behind one that is missing none was taken."""
        with self._sending:
            for key, number in kept.items():
                stream = self._streams[key]
                while stream.unkept and stream.num_kept < number:
                    stream.unkept.popleft()
                    stream.num_kept += 1
                self._send_again(key)

    def _send_again(self, key: tuple[int, str]) -> None:
        stream, (attempt, file) = self._streams[key], key
        for offset, row in enumerate(stream.unkept, start=1):
            self._send(RowWritten(attempt=attempt, file=file, number=stream.num_kept + offset, row=row))


class RelayedSink:
    """`metrics.jsonl` by way of the coordinator."""

    def __init__(self, run: RelayedRun) -> None:
        self._run = run

    def write(self, row: Mapping[str, object]) -> None:
        """Send one row."""
        self._run.append(self._run.dir.metrics, row)

    def close(self) -> None:
        """Do nothing: each row was sent as it came."""


# ---- the coordinator's side


Answer = Callable[[str, RowsKept], None]
"""Sends an answer to the host of a node, for a trainer."""


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a trainer of an attempt says of its rows."""

    slot: Slot
    attempt: int
    message: RowWritten | RowsAsked


@dataclass(frozen=True, kw_only=True)
class _Ask:
    slot: Slot
    attempt: int
    number: int
    has: tuple[tuple[int, str, int], ...]
    """Attempt, file, and its rows that were here when the trainer asked."""


class RowReceiver:
    """Appends the rows of trainers to a run's files, and tells when they are in the storage, on a thread of its own.

    Args:
        check_lead: called before each row; raises if another one keeps this run by now.
        on_failure: takes why rows cannot be taken any more.
    """

    def __init__(
        self,
        run: OpenRun,
        *,
        check_lead: Callable[[], None],
        answer: Answer,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._run = run
        self._check_lead = check_lead
        self._answer = answer
        self._num_rows: dict[tuple[str, int], int] = {}
        """By file and attempt."""
        self._work = Background("rows", on_failure=on_failure)
        self._lock = threading.Lock()
        self._said = deque[_Said]()

    def take(self, slot: Slot, attempt: int, message: RowWritten | RowsAsked) -> None:
        """Take what a trainer of the current attempt says of its rows."""
        with self._lock:
            self._said.append(_Said(slot=slot, attempt=attempt, message=message))
            is_first = len(self._said) == 1
        if is_first:
            self._work.submit(self._take_all)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all that was said so far is done; False if it is not in time."""
        return self._work.wait(timeout_s)

    def _take_all(self) -> None:
        """Take what has come, in order; all ranks ask at about one time, and one push answers them all."""
        with self._lock:
            said, self._said = self._said, deque[_Said]()
        asks: list[_Ask] = []
        for each in said:
            match each.message:
                case RowWritten():
                    self._take_row(each.message)
                case RowsAsked(ask=number, streams=streams):
                    has = tuple((of, file, self._count(file, of)) for of, file in streams)
                    asks.append(_Ask(slot=each.slot, attempt=each.attempt, number=number, has=has))
        if asks:
            self._push_and_answer(asks)

    def _take_row(self, message: RowWritten) -> None:
        """Append a row unless it is here, or one before it is missing: those are sent again when they are asked for."""
        file, attempt = message.file, message.attempt
        if message.number == self._count(file, attempt) + 1:
            self._check_lead()
            append_row(self._run.dir.root / file, message.row)
            self._num_rows[file, attempt] += 1

    def _count(self, file: str, attempt: int) -> int:
        """Return how many rows of an attempt are here; those that another coordinator took, count as well."""
        if (file, attempt) not in self._num_rows:
            path = self._run.dir.root / file
            end_torn_line(path)
            rows = read_rows(path)  # those of samples do not name their attempt: their file does
            self._num_rows[file, attempt] = sum(row.get("attempt", attempt) == attempt for row in rows)
        return self._num_rows[file, attempt]

    def _push_and_answer(self, asks: Sequence[_Ask]) -> None:
        problem = ""
        try:
            self._run.push()
        except OSError as error:
            problem = str(explain(error, self._run.storage.url))
        except SolventError as error:
            problem = str(error)
        for ask in asks:
            slot, number = ask.slot, ask.number
            answer = RowsKept(slot=slot, attempt=ask.attempt, ask=number, kept=ask.has, problem=problem)
            self._answer(slot.node, answer)
