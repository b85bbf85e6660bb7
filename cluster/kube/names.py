"""Names that Kubernetes accepts, made of a run's name."""

import hashlib
import re

MOST_CHARS = 38
"""Of a RayJob: KubeRay takes 47, and our longest suffix for what stands beside it has 8."""


def get_job_name(run: str) -> str:
    """Return the RayJob's name: the run's own if Kubernetes takes it, else one like it that no other run has."""
    if len(run) <= MOST_CHARS and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run):
        return run
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    stem = stem if stem[:1].isalpha() else f"run-{stem}"
    return f"{stem[: MOST_CHARS - 9].rstrip('-')}-{digest}"
