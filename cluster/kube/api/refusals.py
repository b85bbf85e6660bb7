"""What an API server answers when it does not do what it was asked: errors that say what to do about it."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from elastic.errors import ClusterError

KUBERAY_VERSION = "1.7"
"""The oldest whose RayJob has every field that we write."""
_INSTALL = "helm upgrade --install kuberay-operator kuberay/kuberay-operator"
_MISSING = {
    "RayJob": "KubeRay is not installed there: the API server knows no RayJob of ray.io/v1. Install "
    f"{KUBERAY_VERSION} or later: {_INSTALL}.",
    "PodMonitor": "the Prometheus operator is not installed there: the API server knows no PodMonitor. Install it, or "
    "leave --set monitor=true out.",
}
_UNDECLARED = re.compile(r"(\.[^\s:]+): field not declared in schema")
"""Server-side apply's words for a field that an older CRD lacks; they come as an internal error."""

_PATIENCE_S = 120.0
"""A server that has answered before is asked again for so long."""
_RETRY_S = 2.0
_T = TypeVar("_T")


class ServerLostError(ClusterError):
    """The server cannot be reached, is overloaded or broke off: the same question may be answered later."""


class ForbiddenError(ClusterError):
    """The user lacks the right."""


def explain(code: int, status: Mapping[str, Any], kind: str, *, host: str, namespace: str) -> ClusterError:
    """Return the error for an answer that is no success.

    Args:
        status: the body, a Status of the API, or what could be read of it.
        kind: what the request was about.
    """
    said = str(status.get("message") or status.get("reason") or f"HTTP {code}")
    details = cast(dict[str, Any], status.get("details") or {})
    if kind in _MISSING and code == 404 and not details.get("name") and details.get("kind") != "namespaces":
        return ClusterError(f"{host}: {_MISSING[kind]}")
    if undeclared := _UNDECLARED.search(said):
        return ClusterError(
            f"the {kind} that {host} knows has no field {undeclared[1]}: its KubeRay is older than {KUBERAY_VERSION}, "
            f"which this needs. Upgrade the operator and its CRDs ({_INSTALL}; helm leaves CRDs as they are: kubectl "
            "replace -k 'github.com/ray-project/kuberay/ray-operator/config/crd?ref=v1.7.0')."
        )
    error: type[ClusterError] = ClusterError
    match code:
        case 401:
            hint = "Log in to the cluster again (kubectl get pods shows whether you are)."
        case 403 if "quota" in said:
            hint = "Lower what the run asks for (--set spot_nodes=N, cluster.max_workers=N), or have the quota raised."
        case 403 if "cannot " in said:
            error, hint = ForbiddenError, _explain_rights(kind, namespace)
        case 403:
            hint = "A policy of the cluster forbids it: have it changed, or change the manifest with --override FILE."
        case 404 if details.get("kind") == "namespaces":
            hint = f"Create it (kubectl create namespace {namespace}), or --set namespace=NAME."
        case 409:
            hint = "Somebody else has set these fields. Look at the object, then give --take-over to overwrite them."
        case 400 | 422:
            hint = "The versions of KubeRay or Kubernetes there are others than ours; upgrade them, or use --override."
        case _ if code == 429 or code >= 500:
            error, hint = ServerLostError, "Try again; if it stays, look at the cluster."
        case _:
            hint = "Look at the cluster."
    return error(f"{kind} in namespace {namespace} of {host} was refused: {said.rstrip('.')}. {hint}")


def _explain_rights(kind: str, namespace: str) -> str:
    if kind == "PriorityClass":
        return (
            "PriorityClasses belong to the whole cluster: have an administrator create them once, from what solvent "
            "render ... --rights prints."
        )
    return (
        f"Have an administrator give you the Role that solvent render ... --rights prints (get, list, watch, create, "
        f"patch, delete on what a run consists of; get on pods/log) in namespace {namespace}."
    )


def keep_trying(act: Callable[[], _T]) -> _T:
    """Do what can be done twice, through lost connections.

    Raises:
        ServerLostError: the server was away for too long.
        ClusterError: it refused.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act()
        except ServerLostError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_RETRY_S)
