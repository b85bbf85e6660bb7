"""What a job needs that it does not bring: looked for before anything is applied, as KubeRay waits in silence."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from cluster.kube.api.refusals import ForbiddenError, keep_trying
from cluster.kube.api.server import ApiServer
from cluster.kube.manifests import Manifest
from elastic.errors import ClusterError

_SETTINGS = {
    "PersistentVolumeClaim": "--set claim=NAME",
    "ServiceAccount": "--set service_account=NAME",
    "Secret": "--set secret=NAME, or --set auth_secret=NAME",
}
Need = tuple[str, str]
"""A kind and a name."""


def find_needs(documents: Sequence[Manifest]) -> list[Need]:
    """Return the claims, service accounts and secrets that the pods of a stream name, overrides included."""
    return sorted({need for document in documents if document["kind"] == "RayJob" for need in _walk(document["spec"])})


def check_needs(server: ApiServer, documents: Sequence[Manifest], *, say: Callable[[str], None]) -> None:
    """Make sure that all of them exist, as far as one may look.

    Raises:
        ClusterError: some do not.
    """
    missing: list[Need] = []
    for kind, name in find_needs(documents):
        try:
            if not keep_trying(lambda kind=kind, name=name: server.exists(kind, name)):
                missing.append((kind, name))
        except ForbiddenError:
            say(f"{kind} {name} was not looked for: the right to get it is missing")
    if missing:
        names = ", ".join(f"{kind} {name}" for kind, name in missing)
        settings = "; ".join(dict.fromkeys(_SETTINGS[kind] for kind, _ in missing))
        raise ClusterError(
            f"namespace {server.namespace} has no {names}, so no pod of the run could start. Create it there, or name "
            f"another ({settings})."
        )


def _walk(value: object, field: str = "") -> Iterator[Need]:
    if isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from _walk(inner, field)
    elif isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        if field in ("secretRef", "secretKeyRef", "imagePullSecrets") and not fields.get("optional"):
            yield "Secret", fields["name"]
        for key, inner in fields.items():
            match key:
                case "claimName":
                    yield "PersistentVolumeClaim", inner
                case "serviceAccountName":
                    yield "ServiceAccount", inner
                case "secretName":  # of a volume, or of authOptions
                    yield "Secret", inner
                case _:
                    yield from _walk(inner, key)
