"""What an administrator applies once: the rights that `submit` needs, and what belongs to the whole cluster.

Rights of one namespace do. PriorityClasses have none, so a Role cannot grant them; `submit` makes those that are
missing only if it may.
"""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, cast

from cluster.kube.manifests import Manifest, Metadata
from cluster.kube.needs import find_needs
from cluster.kube.server import PATHS

ROLE = "solvent-submit"
_MADE = ["create", "patch", "delete"]
"""Server-side apply asks for the first two."""
_FOLLOWED = ["get", "list", "watch"]


class Rule(TypedDict):
    """What may be done with which resources."""

    apiGroups: list[str]
    resources: list[str]
    resourceNames: NotRequired[list[str]]
    verbs: list[str]


class Role(TypedDict):
    """Rights in one namespace."""

    apiVersion: str
    kind: str
    metadata: Metadata
    rules: list[Rule]


def build_rights(documents: Sequence[Manifest]) -> list[Manifest]:
    """Return the stream's PriorityClasses, and the Role with which it can be submitted, followed and deleted."""
    namespace = documents[-1]["metadata"]["namespace"]
    kinds = dict.fromkeys(document["kind"] for document in documents if document["kind"] != "PriorityClass")
    rules: list[Rule] = [_allow(kind, [*_FOLLOWED, *_MADE] if kind == "RayJob" else _MADE) for kind in kinds]
    rules += [
        _allow("Pod", ["get", "list"]),
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        _allow("Event", ["list"]),
    ]
    # of these only whether they exist; a Secret's right cannot be had without its values
    for kind, name in find_needs(documents):
        rules.append({**_allow(kind, ["get"]), "resourceNames": [name]})
    role: Role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": ROLE, "namespace": namespace},
        "rules": rules,
    }
    shared = [document for document in documents if document["kind"] == "PriorityClass"]
    return [*shared, cast(Manifest, role)]


def describe_rights(namespace: str) -> str:
    """Return what stands above the Role."""
    return (
        "For an administrator, once: kubectl apply -f THIS, then\n"
        f"kubectl create rolebinding {ROLE} --namespace {namespace} --role {ROLE} --user NAME"
    )


def _allow(kind: str, verbs: list[str]) -> Rule:
    parts = PATHS[kind].strip("/").split("/")
    group: Any = parts[1] if parts[0] == "apis" else ""
    return {"apiGroups": [group], "resources": [parts[-1]], "verbs": list(verbs)}
