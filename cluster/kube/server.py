"""The API server of a Kubernetes, through the official client: apply, read, watch, logs, delete.

The client brings the caller's kubeconfig, credentials, proxies and TLS. Requests go through its generic call, because
typed methods differ per kind and ours come as plain documents.
"""

import contextlib
import http.client
import json
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn, cast

from cluster.kube.manifests import Manifest
from elastic.errors import ClusterError

_PATHS = {
    "RayJob": "/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
    "PodMonitor": "/apis/monitoring.coreos.com/v1/namespaces/{namespace}/podmonitors",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "PriorityClass": "/apis/scheduling.k8s.io/v1/priorityclasses",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
}
_APPLY = "application/apply-patch+yaml"
_MANAGER = "solvent"
_TIMEOUT_S = 30
WATCH_S = 240
"""A watch ends after this and is opened again, like kubectl's; a connection that died silently is found by then."""
_MISSING = {
    "RayJob": "KubeRay is not installed there: the API server knows no RayJob of ray.io/v1. Install 1.7 or "
    "later: helm install kuberay-operator kuberay/kuberay-operator.",
    "PodMonitor": "the Prometheus operator is not installed there: the API server knows no PodMonitor. Install it, or "
    "leave --set monitor=true out.",
}


class WatchLostError(Exception):
    """A watch or a log ended early; open it again."""


class ApiServer:
    """One namespace of one cluster."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    def apply(self, document: Manifest, *, on_conflict: str = "refuse") -> Manifest:
        """Create the object, or make it what the document says (server-side apply); return what the server holds.

        Args:
            on_conflict: `refuse` a field that somebody else has set to something else, or `take` it over.

        Raises:
            ClusterError: the server refused, or cannot be reached.
        """
        query = {"fieldManager": _MANAGER, "fieldValidation": "Strict"}
        if on_conflict == "take":
            query["force"] = "true"
        path = self._get_path(document["kind"], document["metadata"]["name"])
        return self._call("PATCH", path, document["kind"], query=query, body=document, content_type=_APPLY)

    def get(self, kind: str, name: str) -> Manifest | None:
        """Return an object, or None if there is none.

        Raises:
            ClusterError: as for `apply`.
        """
        return self._call("GET", self._get_path(kind, name), kind, absent_ok=True) or None

    def list_pods(self, selector: str) -> list[Manifest]:
        """Return the pods with these labels, oldest first.

        Raises:
            ClusterError: as for `apply`.
        """
        found = self._call("GET", self._get_path("Pod"), "Pod", query={"labelSelector": selector})
        pods = cast(list[Manifest], found.get("items") or [])
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object and what it owns; False if there is none.

        Raises:
            ClusterError: as for `apply`.
        """
        query = {"propagationPolicy": "Background"}
        return bool(self._call("DELETE", self._get_path(kind, name), kind, query=query, absent_ok=True))

    def watch(self, kind: str, name: str) -> Iterator[Manifest | None]:
        """Yield the object now and whenever it changes, None once it is deleted, until the server ends the watch.

        Raises:
            ClusterError: the server refused.
            WatchLostError: the connection broke.
        """
        query = {"fieldSelector": f"metadata.name={name}"}
        found = self._call("GET", self._get_path(kind), kind, query=query)
        items = cast(list[Manifest], found.get("items") or [])
        yield items[0] if items else None
        query |= {
            "watch": "true",
            "resourceVersion": str(found["metadata"].get("resourceVersion", "")),
            "timeoutSeconds": str(WATCH_S),
        }
        for line in self._stream(self._get_path(kind), kind, query):
            event = cast(dict[str, Any], json.loads(line))
            if event["type"] == "ERROR":  # what we saw last is too old by now
                raise WatchLostError(str(event["object"].get("message")))
            if event["type"] != "BOOKMARK":
                yield None if event["type"] == "DELETED" else event["object"]

    def stream_log(self, pod: str, *, since: str = "") -> Iterator[tuple[str, str]]:
        """Yield (time, line) of a pod's log until it ends.

        Args:
            since: RFC 3339, with which the server leaves out most of what is older.

        Raises:
            ClusterError: the server refused.
            WatchLostError: the connection broke.
        """
        query = {"follow": "true", "timestamps": "true", **({"sinceTime": since} if since else {})}
        for line in self._stream(f"{self._get_path('Pod', pod)}/log", "Pod", query):
            time, _, text = line.partition(" ")
            yield time, text

    def _get_path(self, kind: str, name: str = "") -> str:
        path = _PATHS[kind].format(namespace=self.namespace)
        return f"{path}/{name}" if name else path

    def _call(
        self,
        method: str,
        path: str,
        kind: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        absent_ok: bool = False,
    ) -> Manifest:
        response = self._send(method, path, query or {}, body, content_type, timeout_s=(_TIMEOUT_S, _TIMEOUT_S))
        with _reach(self._host, lost=ClusterError):
            text = response.read().decode()
        if not 200 <= response.status <= 299:
            status = _parse_status(text)
            is_absent = response.status == 404 and cast(Any, status.get("details") or {}).get("name")
            if absent_ok and is_absent:
                return {}
            self._refuse(response.status, status, kind)
        return cast(Manifest, json.loads(text))

    def _stream(self, path: str, kind: str, query: dict[str, str]) -> Iterator[str]:
        response = self._send("GET", path, query, None, "", timeout_s=(_TIMEOUT_S, WATCH_S + _TIMEOUT_S))
        if not 200 <= response.status <= 299:
            self._refuse(response.status, _parse_status(response.read().decode()), kind)
        rest = b""
        try:
            with _reach(self._host, lost=WatchLostError):
                for chunk in response.response.stream(amt=None, decode_content=True):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line.decode(errors="replace")
        finally:
            response.response.close()
        if rest:
            yield rest.decode(errors="replace")

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object,
        content_type: str,
        *,
        timeout_s: tuple[int, int],
    ) -> Any:
        headers = {"Accept": "application/json, */*"}
        if body is not None:
            headers["Content-Type"] = content_type
        with _reach(self._host, lost=ClusterError):
            request = self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            return self._client.call_api(*request, _request_timeout=timeout_s)

    @property
    def _host(self) -> str:
        return str(self._client.configuration.host)

    def _refuse(self, code: int, status: dict[str, Any], kind: str) -> NoReturn:
        said = str(status.get("message") or status.get("reason") or f"HTTP {code}")
        where = f"namespace {self.namespace} of {self._host}"
        details = cast(dict[str, Any], status.get("details") or {})
        match code:
            case 401:
                hint = "Log in to the cluster again (kubectl get pods shows whether you are)."
            case 403 if "quota" in said:
                hint = (
                    "Lower what the run asks for (--set spot_nodes=N, cluster.max_workers=N), or have the quota raised."
                )
            case 403:
                hint = (
                    f"Ask for the right to get, list, watch, patch and delete {_PATHS[kind].rpartition('/')[2]} there."
                )
            case 404 if details.get("kind") == "namespaces":
                hint = f"Create it (kubectl create namespace {self.namespace}), or --set namespace=NAME."
            case 404 if kind in _MISSING and not details.get("name"):
                raise ClusterError(f"{self._host}: {_MISSING[kind]}")
            case 409:
                hint = (
                    "Somebody else has set these fields. Look at the object, then give --take-over to overwrite them."
                )
            case 400 | 422:
                hint = (
                    "The versions of KubeRay or Kubernetes there are others than ours; upgrade them, or use --override."
                )
            case _:
                hint = "Try again; if it stays, look at the cluster."
        raise ClusterError(f"{kind} in {where} was refused: {said.rstrip('.')}. {hint}")


def connect(namespace: str, *, kubeconfig: str = "", context: str = "") -> ApiServer:
    """Open the cluster of the kubeconfig's current context (or of this one), or the one this process runs in.

    Args:
        kubeconfig: paths as in KUBECONFIG; empty: ~/.kube/config.

    Raises:
        ClusterError: the client is not installed, or no cluster is configured.
    """
    try:
        from kubernetes import client, config  # noqa: PLC0415 (an extra; slow to import)
    except ImportError:
        raise ClusterError(
            "the client of Kubernetes is not installed, so nothing can be submitted. pip install 'solvent[kube]'."
        ) from None
    configuration = client.Configuration()
    try:
        config.load_kube_config(
            config_file=kubeconfig or None, context=context or None, client_configuration=configuration
        )
    except config.ConfigException as error:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            raise ClusterError(
                f"no cluster is configured: {str(error).rstrip('.')}. Set KUBECONFIG, or make kubectl work first."
            ) from None
    configuration.retries = 2
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries are not for our users
    return ApiServer(client.ApiClient(configuration), namespace)


@contextlib.contextmanager
def _reach(host: str, *, lost: Callable[[str], Exception]) -> Generator[None]:
    """Turn what the client raises for a connection that fails into one error of ours."""
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 (comes with the client)

    try:
        yield
    except (HTTPError, OSError, http.client.HTTPException) as error:
        raise lost(f"{host} cannot be reached: {error}. Check the network and the kubeconfig.") from error


def _parse_status(text: str) -> dict[str, Any]:
    try:
        status: Any = json.loads(text)
    except ValueError:
        return {"message": " ".join(text.split())[:200]}
    return cast(dict[str, Any], status) if isinstance(status, dict) else {}
