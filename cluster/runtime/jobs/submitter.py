"""A run as jobs of a Ray cluster: submitted once however often the answer is lost, and followed to its end.

Every job of a run carries the run's name and storage; its id ends in the number of the submission. Who follows may be
cut off and come back: the job's status is asked for, and its log is read on from where it was.
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.runtime.jobs.job_api import Job, JobServer, ServerLostError
from cluster.runtime.jobs.submission import Submission
from elastic.errors import ClusterError

RUN = "solvent_run"
"""The key of a job's metadata that holds `<storage>/<run>`."""
_TRY = "solvent_try"
"""And the key that tells who submitted it: an answer may be lost, and what was asked has happened."""
_POLL_S = 1.0
_MOST_BACKOFF_S = 15.0
_STOP_S = 30.0
"""Ray's own stop of a job that was never placed takes minutes, so nobody waits for it longer."""
_SAVE_S = 300
"""A driver that is asked to stop saves first; Ray kills it after this."""
_LOG_END_S = 15.0
_NOT_FOUND = 127
"""What a shell returns for a command that does not exist."""
_STEP = re.compile(r"\bstep (\d+)/\d+ ")
"""As `elastic.sinks.console.format_row` writes it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a follower waits for what may never come."""

    patience_s: float
    """For a cluster that does not answer."""
    pending_s: float
    """For a driver that is not started."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job, or the following of it, ended."""

    kind: str
    """finished | interrupted | failed | crashed | stopped | unplaced | forgotten | unreachable"""
    reason: str
    exit_code: int
    may_resume: bool = False
    """Another attempt may do better."""
    step: int = 0
    """The highest that its log told of."""
    attempts: int = 1


def submit(
    server: JobServer, submission: Submission, *, nonce: str, say: Callable[[str], None], least_number: int = 1
) -> str:
    """Return the id of the run's job: one that has not ended, else a new one.

    Args:
        nonce: the same whenever this is tried again, as the answer was lost.
        least_number: of a new job; a head that was started anew does not know how many there were.

    Raises:
        ClusterError: the cluster refused.
        ServerLostError: it does not answer; asking again finds what was started.
    """
    server.check_version()
    jobs = [job for job in server.list_jobs() if job.metadata.get(RUN) == submission.run]
    for job in reversed(jobs):
        if not job.has_ended or job.metadata.get(_TRY) == nonce:
            say(f"{job.id} is {job.status.lower()}")
            return job.id
    number = max([least_number, *(get_number(job.id) + 1 for job in jobs)])
    job_id = f"{submission.prefix}{number}"
    runtime_env = {
        "working_dir": server.upload(submission.package),
        # A stop then reaches the driver as Ctrl-C does: it saves, and the run is left resumable.
        "env_vars": {**submission.env, "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(_SAVE_S)},
    }
    is_new = server.submit(
        job_id,
        entrypoint=submission.entrypoint,
        runtime_env=runtime_env,
        metadata={RUN: submission.run, _TRY: nonce},
    )
    say(f"{job_id} {'submitted' if is_new else 'is there already'}")
    return job_id


def get_number(job_id: str) -> int:
    """Return which submission of its run a job is."""
    number = job_id.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def follow(
    server: JobServer, job_id: str, *, say: Callable[[str], None], show: Callable[[str], None], limits: Limits
) -> Ending:
    """Watch a job to its end, through lost connections.

    Args:
        say: takes what we have to tell.
        show: takes the lines of the job's log; it is called from a thread of its own.

    Raises:
        ClusterError: the cluster refused.
    """
    log = _JobLog(server, job_id, show)
    heard_s = pending_s = time.monotonic()
    backoff_s, told = _POLL_S, ""
    try:
        while True:
            try:
                job = server.get(job_id)
            except ServerLostError as error:
                silent_s = time.monotonic() - heard_s
                if silent_s > limits.patience_s:
                    reason = f"{error} Not for {silent_s:.0f} s; the run may go on there. The same command finds it."
                    return _end(log, kind="unreachable", reason=reason, exit_code=1)
                if told != "lost":
                    say(f"{job_id}: {error} Trying again for {limits.patience_s:.0f} s.")
                told = "lost"
                time.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)
                continue
            heard_s, backoff_s = time.monotonic(), _POLL_S
            if job is None:
                reason = "the cluster does not know the job any more: its head was started anew"
                return _end(log, kind="forgotten", reason=reason, exit_code=1, may_resume=True)
            if told != job.status:
                told = job.status
                say(f"{job_id}: {job.status.lower()}")
            if job.has_ended:
                log.finish()
                return _read_ending(job, step=log.step)
            if job.status != "PENDING":
                pending_s = time.monotonic()
                log.start()
            elif time.monotonic() - pending_s > limits.pending_s:
                return _give_up_pending(server, job, log, limits)
            time.sleep(_POLL_S)
    finally:
        log.stop()


def stop(server: JobServer, job_id: str, *, timeout_s: float) -> Job | None:
    """Ask for a job's end, and wait for it so long and no longer; return what became of it.

    Raises:
        ClusterError, ServerLostError: the request failed.
    """
    server.stop(job_id)
    deadline_s = time.monotonic() + timeout_s
    job = server.get(job_id)
    while job and not job.has_ended and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        job = server.get(job_id)
    return job


def _read_ending(job: Job, *, step: int) -> Ending:
    if job.status == "SUCCEEDED":
        return Ending(kind="finished", reason="", exit_code=0, step=step)
    if job.status == "STOPPED":
        return Ending(kind="stopped", reason="it was stopped; the same command resumes it", exit_code=3, step=step)
    reason = _get_last_line(job.message) or job.error_type or "the driver ended without a word"
    kind, code, may_resume = "failed", job.exit_code, False
    match job.exit_code:
        case 2 | 4:
            pass
        case 3:
            kind, may_resume = "interrupted", True
        case 1:
            may_resume = True
        case _ if job.exit_code == _NOT_FOUND:
            reason = "the head has no `solvent` on its PATH. Install it there, in the environment that Ray runs in."
        case None:
            kind, may_resume = "crashed", True
        case killed:
            kind, may_resume, reason = "crashed", True, f"the driver was killed (exit code {killed})"
    return Ending(
        kind=kind, reason=reason, exit_code=code if code in (2, 3, 4) else 1, may_resume=may_resume, step=step
    )


def _get_last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _give_up_pending(server: JobServer, job: Job, log: "_JobLog", limits: Limits) -> Ending:
    """End a job whose driver was not started in time, or say that it may still start."""
    after = "it was withdrawn"
    try:
        left = stop(server, job.id, timeout_s=min(_STOP_S, limits.pending_s))
        if left and not left.has_ended:
            after = "it was asked to stop and has not answered, so it may still start: --delete asks again"
    except (ServerLostError, ClusterError) as error:
        after = f"it could not be withdrawn ({error})"
    said = f" ({_get_last_line(job.message)})" if job.message else ""
    reason = (
        f"its driver was not started within {limits.pending_s:.0f} s{said}; {after}. Look at the head: ray status, and "
        "logs/runtime_env_setup-*.log; --pending-s waits longer"
    )
    return _end(log, kind="unplaced", reason=reason, exit_code=1, may_resume=True)


def _end(log: "_JobLog", *, kind: str, reason: str, exit_code: int, may_resume: bool = False) -> Ending:
    return Ending(kind=kind, reason=reason, exit_code=exit_code, may_resume=may_resume, step=log.step)


class _JobLog:
    """Shows a job's log beside the watch, each line once, however often the connection breaks."""

    def __init__(self, server: JobServer, job_id: str, show: Callable[[str], None]) -> None:
        self.step = 0
        """The highest step that it told of."""
        self._server = server
        self._job_id = job_id
        self._show = show
        self._num_seen = 0
        self._rest = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read, unless it is being read."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Read to the end of a job that has ended, but not for long."""
        self.start()
        assert self._thread is not None
        self._thread.join(_LOG_END_S)

    def stop(self) -> None:
        """Leave it."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                # Ray's dashboard logs a refused request of this kind with its headers, the token among them, so it is
                # made only for a job that is there.
                if self._server.get(self._job_id):
                    asyncio.run(self._read())
                break
            except ServerLostError:  # the watch says what matters
                self._stopping.wait(_POLL_S)
            except ClusterError:
                break
        if self._rest:
            self._take("\n")

    async def _read(self) -> None:
        skip = self._num_seen  # the server begins anew
        async for piece in self._server.tail_log(self._job_id):
            if self._stopping.is_set():
                return
            new, skip = piece[skip:], max(0, skip - len(piece))
            self._num_seen += len(new)
            self._take(new)

    def _take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)
            if found := _STEP.search(line):
                self.step = max(self.step, int(found[1]))
