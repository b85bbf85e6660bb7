"""`python -m elastic CONFIG [key=value ...]`: train without Ray, as one process or under torchrun.

Running it again resumes. SIGTERM and SIGINT are notices: all ranks save at one step and leave.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from time import time
from types import FrameType
from typing import NoReturn

from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from elastic import config_load
from elastic.checkpoint.durable.storage_errors import check_writable
from elastic.config import RunConfig
from elastic.errors import SolventError, StaleGenerationError, StorageError
from elastic.paths import ensure_home
from elastic.ports import (
    Finished,
    Interrupted,
    Lost,
    MetricSink,
    Notice,
    Outcome,
    Phase,
    Progress,
    Source,
    Stall,
    WorldSpec,
)
from elastic.records.attempts import End, build_row, close_torn_attempts, next_attempt, read_history
from elastic.records.leader import Leadership, lead
from elastic.records.rundir import RunDir, append_row
from elastic.records.spool import OpenRun, open_run
from elastic.sinks import open_sinks
from elastic.training.run import train
from elastic.world import open_store

INTERRUPTED_EXIT_CODE = 3


class SignalNotices:
    """SIGTERM and SIGINT as the wish to leave; a SIGTERM leaves `grace_s` seconds (0: as long as it takes)."""

    def __init__(self) -> None:
        self.grace_s = 0.0
        self._notice: Notice | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        deadline_s = time() + self.grace_s if self.grace_s and number == signal.SIGTERM else None
        self._notice = self._notice or Notice(source=signal.Signals(number).name, deadline_s=deadline_s)

    def get_notice(self) -> Notice | None:
        """Return the pending notice at once."""
        return self._notice


class AttemptObserver:
    """Remembers what the row of `attempts.jsonl` needs.

    Args:
        on_restored: called once the run is known to accept its configuration.
        on_stalled: called with the reason, from another thread, once nothing more is to be hoped for.
        peer_patience_s: how long peers may be at something of their own while this rank waits for them.
    """

    def __init__(
        self, *, on_restored: Callable[[], object], on_stalled: Callable[[str], object], peer_patience_s: float
    ) -> None:
        self._on_restored = on_restored
        self._on_stalled = on_stalled
        self._peer_patience_s = peer_patience_s
        self.resumed_step = self.last_step = 0
        self.resumed_from: Source | None = None
        self.first_step_s: float | None = None

    def phase(self, phase: Phase, start_s: float, end_s: float) -> None:
        """Nobody pays by the second here."""

    def restored(self, progress: Progress, source: Source) -> None:
        """Keep where this attempt starts from."""
        self.resumed_step = self.last_step = progress.step
        self.resumed_from = source
        self._on_restored()

    def stepped(self, progress: Progress, row: Mapping[str, object]) -> None:  # noqa: ARG002 (the Protocol's)
        """Keep how far this attempt has come."""
        self.last_step = progress.step
        self.first_step_s = self.first_step_s or time()

    def kept(self, progress: Progress, *, copied: bool) -> None:
        """Say nothing: without a cluster there is no memory that outlives this process."""

    def committed(self, progress: Progress) -> None:
        """Say so."""
        print(f"checkpoint of step {progress.step} committed", flush=True)  # noqa: T201

    def alive(self) -> None:
        """Nobody listens here."""

    def stalled(self, stall: Stall) -> None:
        """Give up, unless this rank may only be waiting for a busy one."""
        may_wait_for_peers = stall.where in ("in a collective", "waiting")
        if not may_wait_for_peers or stall.waited_s > self._peer_patience_s:
            where = "waiting for its device or a peer" if stall.where == "waiting" else stall.where
            self._on_stalled(f"no progress after step {self.last_step} for {stall.waited_s:.0f} s, {where}")


def main(arguments: Sequence[str]) -> int:
    """Train and return the exit code: 0 finished, 2 wrong input, 3 interrupted and resumable, 1 anything else."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)  # noqa: T201
        return 0 if arguments else 2
    notices = SignalNotices()
    rank = int(os.environ.get("RANK", "0"))
    try:
        if (notice := ensure_home(os.environ)) and rank == 0:
            print(notice, file=sys.stderr, flush=True)  # noqa: T201
        config = config_load.load_here(arguments[0], arguments[1:])
        notices.grace_s = config.fault.term_grace_s
        outcome = _run(config, notices)
    except SolventError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    if isinstance(outcome, Finished):
        return 0
    _say_resumable(rank, outcome.reason)
    return INTERRUPTED_EXIT_CODE


def _say_resumable(rank: int, reason: str) -> None:
    print(f"rank {rank}: {reason}; run the same command to resume", file=sys.stderr, flush=True)  # noqa: T201


def _run(config: RunConfig, notices: SignalNotices) -> Outcome:
    with open_run(config.storage, config.run) as run:
        spec, store, leader = _find_world(run, timeout_s=config.fault.collective_timeout_s)
        with leader or nullcontext():
            outcome = _train(config, run, spec, store, notices=notices, leader=leader)
            with suppress(OSError, StaleGenerationError):  # closing the run tries again, and tells
                run.push()  # while we still lead
            return outcome


def _train(
    config: RunConfig,
    run: OpenRun,
    spec: WorldSpec,
    store: Store,
    *,
    notices: SignalNotices,
    leader: Leadership | None,
) -> Outcome:
    """Train one rank; rank 0, which leads, keeps the run records."""
    run_dir = run.dir
    history, sinks, start_s = read_history(run_dir), ExitStack(), time()

    def write_row(end: End, reason: str) -> None:
        row = build_row(
            history,
            attempt=spec.attempt,
            world_size=spec.world_size,
            nodes=[spec.node],
            start_s=start_s,
            end_s=time(),
            end=end,
            reason=reason,
            resumed_from=observer.resumed_from,
            resumed_step=observer.resumed_step,
            last_step=observer.last_step,
            first_step_s=observer.first_step_s,
        )
        if leader:
            with suppress(StaleGenerationError):  # then the run records are another one's, which is told already
                leader.check()
                append_row(run_dir.attempts, asdict(row))

    def give_up(reason: str) -> NoReturn:
        _say_resumable(spec.rank, reason)
        write_row("lost", reason)
        with suppress(OSError, StaleGenerationError):
            run.push()
        os._exit(INTERRUPTED_EXIT_CODE)  # the main thread hangs, so nothing can be closed in order

    observer = AttemptObserver(
        on_restored=partial(_write_config, config, run_dir, spec.rank),
        on_stalled=give_up,
        peer_patience_s=config.fault.hang_data_s,
    )
    end: End = "failed"
    reason = ""
    try:
        outcome = train(
            config,
            spec,
            notices=notices,
            observer=observer,
            open_sinks=partial(_open_sinks, config, run_dir, sinks),
            store=store,
            run=run,
        )
        end, reason = _get_end(outcome)
    except BaseException as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        sinks.close()
        write_row(end, reason)
    return outcome


def _open_sinks(config: RunConfig, run_dir: RunDir, opened: ExitStack) -> list[MetricSink]:
    sinks = open_sinks(config, run_dir, opener="rank0")
    for sink in sinks:
        opened.callback(sink.close)
    return sinks


def _write_config(config: RunConfig, run_dir: RunDir, rank: int) -> None:
    """Keep what runs; a configuration that the run's checkpoints refuse never gets here."""
    if rank == 0:
        run_dir.config.write_text(config_load.dump(config))


def _get_end(outcome: Outcome) -> tuple[End, str]:
    match outcome:
        case Finished():
            return "finished", "all steps done"
        case Interrupted(reason=reason):
            return "interrupted", reason
        case Lost(reason=reason):
            return "lost", reason


def _find_world(run: OpenRun, *, timeout_s: float) -> tuple[WorldSpec, Store, Leadership | None]:
    """Return this process's place: the one that torchrun's environment names, or a world of its own.

    Rank 0 takes the lead of the run and tells the others the attempt's number; nothing of the run is touched before.

    Raises:
        StorageError: another process trains this run, or its storage does not work.
    """
    leader: Leadership | None = None
    if "RANK" not in os.environ:
        store: Store = open_store("127.0.0.1", timeout_s=timeout_s)
        rank, world_size = 0, 1
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    key = f"solvent-attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        try:
            check_writable(run.storage)  # a probe of its own, and the better message
            leader = lead(run.storage, who="python -m elastic", at_least=next_attempt(run.dir))
            run.lead(leader.check, generation=leader.generation)
        except StorageError:
            store.set(key, "0")
            raise
        close_torn_attempts(run.dir)
        store.set(key, str(leader.generation))
    attempt = int(store.get(key))
    if not attempt:
        raise StorageError(f"storage: {run.storage.url} cannot be used; rank 0 says why.")
    spec = WorldSpec(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        attempt=attempt,
        store_host="",  # the store is here already
        store_port=0,
    )
    return spec, store, leader


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
