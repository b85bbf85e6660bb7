"""A rendered stream on a cluster: applied once, found again, deleted on request."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from cluster.kube.api.follow import describe, has_ended, has_finished
from cluster.kube.api.needs import check_needs
from cluster.kube.api.refusals import ForbiddenError, ServerLostError, keep_trying
from cluster.kube.api.server import ApiServer
from cluster.kube.manifests import Manifest
from elastic.errors import ClusterError

_SHARED_KINDS = ("PriorityClass",)
"""All runs use the same ones, so they outlive any."""
_DIGEST = "solvent.dev/rendered"
"""The annotation of a job by which the same command knows its own."""
_DELETE_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What became of a submission."""

    job: str
    how: Literal["applied", "found", "finished"]
    """`finished`: this very run has been trained to its end, so there is nothing to start."""


def submit(
    server: ApiServer,
    documents: Sequence[Manifest],
    *,
    on_conflict: str = "refuse",
    find_end: Callable[[], str] = lambda: "",
    say: Callable[[str], None],
) -> Submitted:
    """Apply the stream; a job of that name that has ended makes room first.

    A job that has not ended is left as it is, so that the same command, given again, finds it. To apply it once more
    would be refused: KubeRay has written to it since, and owns what that changed.

    Args:
        on_conflict: `refuse` fields of others, or `take` them over, also those of a job that has not ended.
        find_end: asked before a cluster is started for a job; returns why the run has no need of one, or nothing.

    Raises:
        ClusterError: the cluster refused, or cannot be reached.
    """
    name = get_job_name(documents)
    documents = _sign(documents)
    held = server.get("RayJob", name)
    if held and held["metadata"].get("deletionTimestamp"):
        _wait_until_gone(server, name)
        held = None
    is_same = held is not None and _get_digest(held) == _get_digest(documents[-1])
    if held and has_finished(held) and is_same:
        say(
            f"{name} has finished: nothing is left to train. Give it more steps (train.steps=N), another name "
            "(run=...), or delete the job first (--delete)."
        )
        return Submitted(job=name, how="finished")
    if held and not has_ended(held) and on_conflict != "take":
        change = "" if is_same else "; what was changed since counts after --delete, or is forced in with --take-over"
        say(f"{name} is there ({describe(held)}) and is left as it is{change}")
        return Submitted(job=name, how="found")
    if reason := find_end():
        say(f"finished: {reason}")
        return Submitted(job=name, how="finished")
    check_needs(server, documents, say=say)
    if held and has_ended(held):
        say(f"{name} has ended ({describe(held)}); it is submitted again, and resumes")
        keep_trying(lambda: server.delete("RayJob", name))
        _wait_until_gone(server, name)
    _apply(server, documents, on_conflict=on_conflict, say=say)
    return Submitted(job=name, how="applied")


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
            was_there = keep_trying(lambda kind=kind, name=name: server.delete(kind, name))
            say(f"{kind} {name} {'deleted' if was_there else 'was not there'}")
    _wait_until_gone(server, get_job_name(documents))


def _apply(server: ApiServer, documents: Sequence[Manifest], *, on_conflict: str, say: Callable[[str], None]) -> None:
    """Apply all; if one is refused, take back what was new with it, as nothing else would ever delete that."""
    made: list[tuple[str, str]] = []
    try:
        for document in documents:
            kind, name = document["kind"], document["metadata"]["name"]
            if kind in _SHARED_KINDS and _is_provided(server, document, say=say):
                continue
            apply = keep_trying(lambda document=document: server.apply(document, on_conflict=on_conflict))
            if apply.is_new and kind not in _SHARED_KINDS:
                made.append((kind, name))
            say(f"{kind} {name} applied")
    except ServerLostError:  # whether it took the last one is not known
        raise
    except ClusterError:
        for kind, name in reversed(made):
            try:
                server.delete(kind, name)
                say(f"{kind} {name} deleted again")
            except ClusterError as error:
                say(f"{kind} {name} is left behind: {error}")
        raise


def _is_provided(server: ApiServer, document: Manifest, *, say: Callable[[str], None]) -> bool:
    """Tell whether an object that all runs share need not be made: it is there, or others must see to that."""
    kind, name = document["kind"], document["metadata"]["name"]
    try:
        held = keep_trying(lambda: server.get(kind, name))
    except ForbiddenError:
        say(
            f"{kind} {name} was not looked for: the right to get it is missing. If it is not there, no pod starts: "
            "have an administrator apply what solvent render ... --rights prints, once per cluster"
        )
        return True
    if held is not None and held.get("value") != document["value"]:
        say(f"{kind} {name} has the value {held.get('value')} there, not {document['value']}; it is left as it is")
    return held is not None


def _sign(documents: Sequence[Manifest]) -> list[Manifest]:
    """Return the stream with its digest on the job, which is the last of it."""
    digest = hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()[:16]
    *others, job = documents
    annotations = {**job["metadata"].get("annotations", {}), _DIGEST: digest}
    return [*others, {**job, "metadata": {**job["metadata"], "annotations": annotations}}]


def _get_digest(job: Manifest) -> str | None:
    return cast(dict[str, Any], job["metadata"].get("annotations") or {}).get(_DIGEST)


def _wait_until_gone(server: ApiServer, name: str) -> None:
    deadline_s = time.monotonic() + _DELETE_S
    while keep_trying(lambda: server.get("RayJob", name)):
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"RayJob {name} is still there {_DELETE_S:.0f} s after it was deleted: KubeRay has not let it go. Look "
                f"at kubectl describe rayjob {name} (a service account or a Secret that it names and that is not there "
                "keeps KubeRay 1.7.0 from it: create that), then try again."
            )
        time.sleep(0.5)
