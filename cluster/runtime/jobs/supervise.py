"""The supervisor: submits a run again, from outside of the cluster, until it has finished or is getting nowhere."""

import dataclasses
import secrets
import time
from collections.abc import Callable

from cluster.runtime.jobs.job_api import JobServer, ServerLostError
from cluster.runtime.jobs.submission import Submission
from cluster.runtime.jobs.submitter import Ending, Limits, follow, get_number, submit

FRUITLESS_ATTEMPTS = 5
"""So many in a row that take the run no further are a crash loop."""
_FIRST_BACKOFF_S = 2.0
_MOST_BACKOFF_S = 300.0
_LOOK_S = 2.0


@dataclasses.dataclass
class Patience:
    """Decides whether one more attempt is worth it, by the steps that attempts reach: waiting alone is no progress."""

    step: int = 0
    """The highest that any attempt has reached."""
    fruitless: int = 0

    def get_backoff_s(self, step: int) -> float | None:
        """Take in an attempt that has ended at a step; return how long to wait before the next, None: no next."""
        self.fruitless = 0 if step > self.step else self.fruitless + 1
        self.step = max(self.step, step)
        if self.fruitless >= FRUITLESS_ATTEMPTS:
            return None
        return min(_FIRST_BACKOFF_S * 2**self.fruitless, _MOST_BACKOFF_S)


def supervise(
    server: JobServer,
    submission: Submission,
    *,
    say: Callable[[str], None],
    show: Callable[[str], None],
    limits: Limits,
    sleep: Callable[[float], None] = time.sleep,
) -> Ending:
    """Submit and follow until the run has finished, cannot go on, or goes round in circles.

    Raises:
        ClusterError: the cluster refused.
    """
    patience = Patience()
    attempts = number = 0
    while True:
        job_id = submit_with_patience(server, submission, say=say, limits=limits, least_number=number + 1)
        if isinstance(job_id, Ending):
            return dataclasses.replace(job_id, attempts=attempts)
        number = get_number(job_id)
        attempts += 1
        ending = dataclasses.replace(follow(server, job_id, say=say, show=show, limits=limits), attempts=attempts)
        if not ending.may_resume:
            return ending
        backoff_s = patience.get_backoff_s(ending.step)
        if backoff_s is None:
            reason = (
                f"{patience.fruitless} attempts in a row did not get beyond step {patience.step}, so another would not "
                f"either; the last one: {ending.reason}"
            )
            return dataclasses.replace(ending, reason=reason, may_resume=False)
        say(f"{job_id} {ending.kind} at step {ending.step}: {ending.reason}; submitting again in {backoff_s:.0f} s")
        sleep(backoff_s)


def submit_with_patience(
    server: JobServer, submission: Submission, *, say: Callable[[str], None], limits: Limits, least_number: int = 1
) -> str | Ending:
    """Submit once the cluster answers; return the job's id, or that it does not answer.

    Raises:
        ClusterError: the cluster refused.
    """
    start_s = time.monotonic()
    nonce = secrets.token_hex(8)
    is_told = False
    while True:
        try:
            return submit(server, submission, nonce=nonce, say=say, least_number=least_number)
        except ServerLostError as error:
            if time.monotonic() - start_s > limits.patience_s:
                reason = f"{error} Not for {limits.patience_s:.0f} s, so nothing was submitted."
                return Ending(kind="unreachable", reason=reason, exit_code=1)
            if not is_told:
                say(f"{error} Trying again for {limits.patience_s:.0f} s.")
                is_told = True
            time.sleep(_LOOK_S)
