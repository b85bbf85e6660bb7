"""A job on a cluster, followed to its end: its states, its log, the cluster's warnings, through lost connections."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from cluster.kube.api.job_log import JobLog
from cluster.kube.api.job_warnings import JobWarnings
from cluster.kube.api.refusals import ServerLostError
from cluster.kube.api.server import ApiServer
from cluster.kube.manifests import Manifest
from cluster.log_lines import Colors

_ENDS = ("Complete", "Failed", "ValidationFailed")
_EXIT_CODE = re.compile(r"failed with exit code (\d+)")
"""Ray's own words for an entrypoint that failed, and ours for one that ended its job for good (see
cluster/runtime/jobs/retries.py); KubeRay passes them on as the RayJob's message."""
_OUR_CODES = (2, 3, 4)
_MOST_BACKOFF_S = 30.0
_FIRST_BACKOFF_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a RayJob ended."""

    kind: str
    """finished | failed | deleted"""
    reason: str
    exit_code: int
    attempts: int


def follow(
    server: ApiServer,
    name: str,
    *,
    say: Callable[[str], None],
    show: Callable[[str], None],
    colors: Colors = "strip",
) -> Ending:
    """Watch a job to its end; a server that is away for a while, or overloaded, is asked again for as long as it takes.

    Args:
        say: takes what we have to tell, a change of state at a time; it is called from several threads.
        show: takes the lines of the job's log; it is called from a thread of its own.
        colors: `keep` those of the log for a terminal.

    Raises:
        ClusterError: the server refused.
    """
    log = JobLog(server, name, show=show, say=say, colors=colors)
    warnings = JobWarnings(server, name, say=say)
    try:
        ending = _watch(server, name, say=say, log=log, warnings=warnings)
    finally:
        warnings.stop()
    log.stop()
    return ending


def _watch(server: ApiServer, name: str, *, say: Callable[[str], None], log: JobLog, warnings: JobWarnings) -> Ending:
    told = ""
    backoff_s = _FIRST_BACKOFF_S
    while True:
        try:
            for job in server.watch("RayJob", name):
                backoff_s = _FIRST_BACKOFF_S
                if job is None:
                    return Ending(kind="deleted", reason="the RayJob was deleted", exit_code=3, attempts=0)
                if (now := describe(job)) != told:
                    told = now
                    say(f"{name}: {now}")
                if has_ended(job):
                    return _read_ending(job)
                warnings.follow(job)
                if get_status(job).get("jobDeploymentStatus") == "Running":
                    log.start()
        except ServerLostError as error:
            say(f"{name}: {error} The job goes on; trying again in {backoff_s:.1f} s.")
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)


def get_status(job: Manifest) -> dict[str, Any]:
    """Return the status that KubeRay has given a job; empty before it has."""
    return cast(dict[str, Any], job.get("status") or {})


def has_ended(job: Manifest) -> bool:
    """Tell whether KubeRay will start no attempt any more."""
    return get_status(job).get("jobDeploymentStatus") in _ENDS


def has_finished(job: Manifest) -> bool:
    """Tell whether the run was trained to its last step."""
    status = get_status(job)
    return status.get("jobDeploymentStatus") == "Complete" and status.get("jobStatus") == "SUCCEEDED"


def describe(job: Manifest) -> str:
    """Return a job's state in a few words."""
    status = get_status(job)
    words = [str(status.get("jobDeploymentStatus") or "waiting for KubeRay")]
    words += [str(status[key]) for key in ("jobStatus", "reason") if status.get(key)]
    words += [f"failed attempts: {status['failed']}"] if status.get("failed") else []
    return ", ".join(words)


def _read_ending(job: Manifest) -> Ending:
    status = get_status(job)
    attempts = int(status.get("failed") or 0) + int(status.get("succeeded") or 0)
    if has_finished(job):
        return Ending(kind="finished", reason="", exit_code=0, attempts=attempts)
    attempts += status.get("jobStatus") == "STOPPED"  # KubeRay counts these neither way
    message = " ".join(str(status.get("message") or "").split())
    said = _EXIT_CODE.search(message)
    code = int(said[1]) if said and int(said[1]) in _OUR_CODES else 1
    reason = ": ".join(part for part in (str(status.get("reason") or ""), message[:500]) if part)
    return Ending(kind="failed", reason=reason or describe(job), exit_code=code, attempts=attempts)
