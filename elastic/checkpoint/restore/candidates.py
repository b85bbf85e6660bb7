"""The states that a run could go on from, the best first, and what is wrong with one. No tensors here."""

import logging
from collections.abc import Mapping, Sequence

from elastic.checkpoint.durable.storage_errors import explain_unreadable
from elastic.checkpoint.format.compat import check_resume, check_tensors
from elastic.checkpoint.format.manifest import CommittedCheckpoint, Manifest, find_damage, list_committed, read_manifest
from elastic.checkpoint.replicas.discovery import WholeSnapshot, assemble, outline
from elastic.checkpoint.replicas.inventory import ReplicaInfo
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.ports import DataIdentity, Source
from elastic.storage import Storage, is_url

logger = logging.getLogger(__name__)

Candidate = CommittedCheckpoint | WholeSnapshot


def find_candidates(storage: Storage, replicas: Sequence[ReplicaInfo]) -> list[Candidate] | SolventError:
    """Return the states to try, the best first: of two of one step that in memory, which is faster to read."""
    try:
        committed = list_committed(storage)
    except OSError as error:
        return explain_unreadable(error, storage.url)
    found: list[Candidate] = [*assemble(replicas), *reversed(committed)]
    return sorted(found, key=lambda candidate: -candidate.step)


def outline_candidate(candidate: Candidate) -> Candidate:
    """Return what other ranks are told of a state."""
    return outline(candidate) if isinstance(candidate, WholeSnapshot) else candidate


def get_source(candidate: Candidate, storage: Storage) -> Source:
    """Return what the run records say a run went on from."""
    if isinstance(candidate, CommittedCheckpoint):
        return "remote" if is_url(storage.url) else "disk"
    if candidate.needs_disks:
        return "disk"
    return "peer" if candidate.needs_copies else "memory"


def describe_candidate(candidate: Candidate, storage: Storage) -> str:
    """Return its name, for a message."""
    if isinstance(candidate, CommittedCheckpoint):
        return f"{storage.url}/{candidate.directory}"
    return f"the snapshot of step {candidate.step} on the nodes"


def inspect_candidate(
    storage: Storage,
    candidate: Candidate,
    config: RunConfig,
    data: DataIdentity | None,
    live_shapes: Mapping[str, tuple[int, ...]],
) -> Manifest | SolventError | str:
    """Return the manifest of a state to load, why the run cannot go on from it, or what is damaged."""
    is_stored = isinstance(candidate, CommittedCheckpoint)
    try:
        manifest = read_manifest(storage, candidate) if is_stored else candidate.manifest
        remarks = check_resume(config, manifest, data=data)
        check_tensors(live_shapes, manifest)
        damage = find_damage(storage, candidate, manifest) if is_stored else None
    except OSError as error:
        return explain_unreadable(error, storage.url)
    except SolventError as error:
        return error
    for remark in remarks:
        logger.warning("%s", remark)
    return damage or manifest
