"""What an administrator applies once: the rights that `submit` needs, and what belongs to the whole cluster.

Rights of one namespace do. PriorityClasses have none, so a Role cannot grant them; `submit` makes those that are
missing only if it may.
"""

from collections.abc import Sequence, Set
from typing import Any, Literal, NotRequired, TypedDict, cast

from cluster.kube.api.needs import find_needs
from cluster.kube.api.server import PATHS
from cluster.kube.manifests import Manifest, Metadata

ROLE = "solvent-submit"
WATCH_ROLE = "solvent-node-notices"
_RBAC = "rbac.authorization.k8s.io"
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
    """Rights in one namespace, or (ClusterRole) in all and for what belongs to none."""

    apiVersion: str
    kind: Literal["Role", "ClusterRole"]
    metadata: Metadata
    rules: list[Rule]


class Binding(TypedDict):
    """Who has the rights of a role."""

    apiVersion: str
    kind: Literal["RoleBinding", "ClusterRoleBinding"]
    metadata: Metadata
    roleRef: dict[str, str]
    subjects: list[dict[str, str]]


def build_rights(documents: Sequence[Manifest]) -> list[Manifest]:
    """Return the stream's PriorityClasses, and the Role with which it can be submitted, followed and deleted."""
    namespace = documents[-1]["metadata"]["namespace"]
    kinds = dict.fromkeys(document["kind"] for document in documents if document["kind"] != "PriorityClass")
    rules = [_allow(kind, [*_FOLLOWED, *_MADE] if kind == "RayJob" else _MADE) for kind in kinds]
    log: Rule = {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]}
    rules += [_allow("Pod", ["get", "list"]), log, _allow("Event", ["list"])]
    # of these only whether they exist; a Secret's right cannot be had without its values
    for kind, name in find_needs(documents):
        rule = _allow(kind, ["get"])
        rule["resourceNames"] = [name]
        rules.append(rule)
    role = _build_role("Role", ROLE, rules, namespace)
    shared = [document for document in documents if document["kind"] == "PriorityClass"]
    return [*shared, *_build_watch_rights(documents[-1], namespace), cast(Manifest, role)]


def _build_watch_rights(job: Manifest, namespace: str) -> list[Manifest]:
    """Return what lets the service account of workers that watch their nodes do so; nothing if they do not."""
    templates = [group["template"]["spec"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    accounts = {spec["serviceAccountName"] for spec in templates if spec.get("automountServiceAccountToken")}
    if not accounts:
        return []
    name = f"{WATCH_ROLE}-{namespace}"
    nodes: Rule = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}
    made = [
        _build_role("ClusterRole", name, [nodes]),
        _build_binding("ClusterRoleBinding", name, accounts, namespace),
        _build_role("Role", WATCH_ROLE, [_allow("Pod", ["get"])], namespace),
        _build_binding("RoleBinding", WATCH_ROLE, accounts, namespace),
    ]
    return cast(list[Manifest], made)


def _build_role(kind: Literal["Role", "ClusterRole"], name: str, rules: list[Rule], namespace: str = "") -> Role:
    metadata: Metadata = {"name": name, "namespace": namespace} if namespace else {"name": name}
    return {"apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": metadata, "rules": rules}


def _build_binding(
    kind: Literal["RoleBinding", "ClusterRoleBinding"], name: str, accounts: Set[str], namespace: str
) -> Binding:
    is_of_all = kind == "ClusterRoleBinding"
    role = {"apiGroup": _RBAC, "kind": "ClusterRole" if is_of_all else "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": account, "namespace": namespace} for account in sorted(accounts)]
    metadata: Metadata = {"name": name} if is_of_all else {"name": name, "namespace": namespace}
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": kind,
        "metadata": metadata,
        "roleRef": role,
        "subjects": subjects,
    }


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
