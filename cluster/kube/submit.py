"""A rendered stream on a cluster: applied, followed to its end, deleted on request."""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cluster.kube.manifests import Manifest
from cluster.kube.server import ApiServer, WatchLostError
from elastic.errors import ClusterError

_ENDS = ("Complete", "Failed")
_EXIT_CODE = re.compile(r"failed with exit code (\d+)")
"""Ray's own words for an entrypoint that failed; KubeRay passes them on as the RayJob's message."""
_OUR_CODES = (2, 3, 4)
_SHARED_KINDS = ("PriorityClass",)
"""All runs use the same ones, so they outlive any."""
_DELETE_S = 180.0
_LOG_RETRY_S = 2.0
_MOST_BACKOFF_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a RayJob ended."""

    kind: str
    """finished | failed | deleted"""
    reason: str
    exit_code: int
    attempts: int


def submit(
    server: ApiServer, documents: Sequence[Manifest], *, on_conflict: str = "refuse", say: Callable[[str], None]
) -> str:
    """Apply the stream and return the RayJob's name; a job of that name that has ended makes room first.

    A job that still runs is left as it is, so that the same command, given again, finds it.

    Raises:
        ClusterError: the cluster refused, or cannot be reached.
    """
    name = get_job_name(documents)
    held = server.get("RayJob", name)
    if held and get_status(held).get("jobDeploymentStatus") in (*_ENDS, "ValidationFailed"):
        say(f"{name} has ended ({_describe(held)}); it is submitted again, and resumes")
        server.delete("RayJob", name)
        _wait_until_gone(server, name)
        held = None
    if held and held.get("metadata", {}).get("deletionTimestamp"):
        _wait_until_gone(server, name)
    for document in documents:
        server.apply(document, on_conflict=on_conflict)
        say(f"{document['kind']} {document['metadata']['name']} applied")
    return name


def get_job_name(documents: Sequence[Manifest]) -> str:
    """Return the RayJob's name."""
    return next(document["metadata"]["name"] for document in documents if document["kind"] == "RayJob")


def delete(server: ApiServer, documents: Sequence[Manifest], *, say: Callable[[str], None]) -> None:
    """Delete what a stream made; what all runs share stays.

    Raises:
        ClusterError: the cluster refused, or the job did not go.
    """
    for document in reversed(documents):
        kind, name = document["kind"], document["metadata"]["name"]
        if kind not in _SHARED_KINDS:
            say(f"{kind} {name} {'deleted' if server.delete(kind, name) else 'was not there'}")
    _wait_until_gone(server, get_job_name(documents))


def follow(server: ApiServer, name: str, *, say: Callable[[str], None], show: Callable[[str], None]) -> Ending:
    """Watch a job to its end, through lost connections.

    Args:
        say: takes what we have to tell, a change of state at a time.
        show: takes the lines of the job's log; it is called from a thread of its own.

    Raises:
        ClusterError: the cluster refused.
    """
    log = _JobLog(server, name, show)
    told = ""
    backoff_s = 0.5
    while True:
        try:
            for job in server.watch("RayJob", name):
                backoff_s = 0.5
                if job is None:
                    log.stop()
                    return Ending(kind="deleted", reason="the RayJob was deleted", exit_code=3, attempts=0)
                if (now := _describe(job)) != told:
                    told = now
                    say(f"{name}: {now}")
                state = str(get_status(job).get("jobDeploymentStatus", ""))
                log.follow(is_running=state == "Running")
                if state in (*_ENDS, "ValidationFailed"):
                    log.stop()
                    return _read_ending(job)
        except WatchLostError as error:
            say(f"{name}: {error} Trying again in {backoff_s:.1f} s.")
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)


def get_status(job: Manifest) -> dict[str, Any]:
    """Return the status that KubeRay has given a job; empty before it has."""
    return cast(dict[str, Any], job.get("status") or {})


def _describe(job: Manifest) -> str:
    status = get_status(job)
    words = [str(status.get("jobDeploymentStatus") or "waiting for KubeRay")]
    words += [str(status[key]) for key in ("jobStatus", "reason") if status.get(key)]
    words += [f"failed attempts: {status['failed']}"] if status.get("failed") else []
    return ", ".join(words)


def _read_ending(job: Manifest) -> Ending:
    status = get_status(job)
    attempts = int(status.get("failed") or 0) + int(status.get("succeeded") or 0)
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return Ending(kind="finished", reason="", exit_code=0, attempts=attempts)
    message = " ".join(str(status.get("message") or "").split())
    said = _EXIT_CODE.search(message)
    code = int(said[1]) if said and int(said[1]) in _OUR_CODES else 1
    reason = ": ".join(part for part in (str(status.get("reason") or ""), message[:500]) if part)
    return Ending(kind="failed", reason=reason or _describe(job), exit_code=code, attempts=attempts)


def _wait_until_gone(server: ApiServer, name: str) -> None:
    deadline_s = time.monotonic() + _DELETE_S
    while server.get("RayJob", name):
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"RayJob {name} is still there {_DELETE_S:.0f} s after it was deleted: KubeRay has not let it go. Look "
                f"at kubectl describe rayjob {name}, then try again."
            )
        time.sleep(0.5)


class _JobLog:
    """Shows the log of the pods that submit the job, attempt by attempt, each line once, beside the watch."""

    def __init__(self, server: ApiServer, name: str, show: Callable[[str], None]) -> None:
        self._server = server
        self._selector = f"job-name={name}"
        self._show = show
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._seen: dict[str, str] = {}
        """Pod -> time of its last line that was shown."""
        self._complete: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)

    def follow(self, *, is_running: bool) -> None:
        """Start, once there is something to read."""
        if is_running and not self._wanted.is_set():
            self._wanted.set()
            self._thread.start()

    def stop(self) -> None:
        """Read what is left, but not for long."""
        self._stopping.set()
        if self._wanted.is_set():
            self._thread.join(10 * _LOG_RETRY_S)

    def _run(self) -> None:
        while True:
            is_last_round = self._stopping.is_set()
            try:
                pods = self._server.list_pods(self._selector)
                for pod in [p["metadata"]["name"] for p in pods if p["metadata"]["name"] not in self._complete]:
                    self._read(pod)
            except (WatchLostError, ClusterError, json.JSONDecodeError):
                pass  # the pod is not ready, is gone, or the connection broke; the watch says what matters
            if is_last_round:
                return
            self._stopping.wait(_LOG_RETRY_S)

    def _read(self, pod: str) -> None:
        since = self._seen.get(pod, "")
        for at, line in self._server.stream_log(pod, since=since):
            if at > since:  # the server goes by whole seconds
                self._seen[pod] = at
                self._show(line)
        if _is_over(self._server, pod):
            self._complete.add(pod)


def _is_over(server: ApiServer, pod: str) -> bool:
    """Whether a pod has ended, so that its log is complete."""
    found = server.get("Pod", pod)
    return found is None or found.get("status", {}).get("phase") in ("Succeeded", "Failed")
