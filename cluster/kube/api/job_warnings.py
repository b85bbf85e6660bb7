"""Why a job does not start: the Warning events of what it consists of, each told once."""

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from cluster.kube.api.refusals import ForbiddenError
from cluster.kube.api.server import ApiServer
from cluster.kube.manifests import Manifest
from elastic.errors import ClusterError

EVERY_S = 5.0
_AGAIN_S = 120.0
"""A reason whose words change (so many of so many nodes) is told again after this."""
_MOST_CHARS = 400


class JobWarnings:
    """Asks for events beside the watch, in a thread of its own, until `stop`."""

    def __init__(self, server: ApiServer, name: str, *, say: Callable[[str], None]) -> None:
        self._server = server
        self._name = name
        self._say = say
        self._job: Manifest | None = None
        self._told: dict[tuple[str, str, str], tuple[str, float]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-warnings", daemon=True)

    def follow(self, job: Manifest) -> None:
        """Take the job as it is now: the names of what it consists of are there."""
        self._job = job
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """End, without waiting."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._tell()
            except ForbiddenError as error:
                self._say(f"{self._name}: warnings of the cluster are not shown: {error}")
                return
            except ClusterError:
                pass  # the watch says what matters
            self._stopping.wait(EVERY_S)

    def _tell(self) -> None:
        job = self._job
        assert job is not None
        now_s = time.monotonic()
        for event in self._server.list_warnings():
            about = cast(dict[str, Any], event.get("involvedObject") or {})
            if not concerns(job, about) or _get_time(event) < str(job["metadata"].get("creationTimestamp", "")):
                continue
            key = (str(about["kind"]), str(about["name"]), str(event.get("reason")))
            message = " ".join(str(event.get("message") or "").split())
            told, told_s = self._told.get(key, ("", -_AGAIN_S))
            if message != told and now_s - told_s >= _AGAIN_S:
                self._told[key] = (message, now_s)
                self._say(f"{self._name}: warning: {key[0]} {key[1]}: {key[2]}: {message[:_MOST_CHARS]}")


def concerns(job: Manifest, about: Mapping[str, Any]) -> bool:
    """Tell whether an object is the job, or something that it consists of."""
    name, kind, other = job["metadata"]["name"], about.get("kind"), str(about.get("name"))
    cluster = str((job.get("status") or {}).get("rayClusterName") or "")
    match kind:
        case "RayJob" | "Job":
            return other == name
        case "RayCluster":
            return other == cluster
        case "Pod":
            is_submitter = re.fullmatch(rf"{re.escape(name)}-[a-z0-9]{{5}}", other) is not None
            return is_submitter or (cluster != "" and other.startswith(f"{cluster}-"))
        case "PersistentVolumeClaim":
            return other in find_claims(job["spec"])
        case _:
            return False


def find_claims(value: object) -> set[str]:
    """Return the names of the PersistentVolumeClaims in a manifest."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        own = {str(fields["claimName"])} if "claimName" in fields else set[str]()
        return own.union(*(find_claims(inner) for inner in fields.values()))
    if isinstance(value, list):
        return set[str]().union(*(find_claims(inner) for inner in cast(list[Any], value)))
    return set()


def _get_time(event: Manifest) -> str:
    series = cast(dict[str, Any], event.get("series") or {})
    times = (event.get("lastTimestamp"), series.get("lastObservedTime"), event.get("eventTime"))
    return max(str(time_utc or "") for time_utc in times)
