"""The API server of a Kubernetes, through the official client: apply, read, watch, logs, delete.

The client brings the caller's kubeconfig, credentials, proxies and TLS. Requests go through its generic call, because
typed methods differ per kind and ours come as plain documents.
"""

import contextlib
import http.client
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

from cluster.kube.api.refusals import ServerLostError, explain
from cluster.kube.manifests import Manifest
from elastic.errors import ClusterError

PATHS = {
    "RayJob": "/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
    "PodMonitor": "/apis/monitoring.coreos.com/v1/namespaces/{namespace}/podmonitors",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "PriorityClass": "/apis/scheduling.k8s.io/v1/priorityclasses",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "Event": "/api/v1/namespaces/{namespace}/events",
    "PersistentVolumeClaim": "/api/v1/namespaces/{namespace}/persistentvolumeclaims",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{namespace}/secrets",
}
_APPLY = "application/apply-patch+yaml"
_JSON = "application/json, */*"
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_MANAGER = "solvent"
_TIMEOUT_S = 30
WATCH_S = 20
"""A watch ends after this and is opened again; one whose connection died silently is noticed little later."""
LOG_SILENT_S = 6
"""A log that says nothing for so long is opened again, as its connection may be dead: a driver prints every five."""
_SLACK_S = 3


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of a document that was applied."""

    is_new: bool
    document: Manifest
    """What the server holds."""


class ApiServer:
    """One namespace of one cluster."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    def apply(self, document: Manifest, *, on_conflict: str = "refuse") -> Applied:
        """Create the object, or make it what the document says (server-side apply).

        Args:
            on_conflict: `refuse` a field that somebody else has set to something else, or `take` it over.

        Raises:
            ServerLostError: it cannot be reached, or not now.
            ClusterError: the server refused.
        """
        query = {"fieldManager": _MANAGER, "fieldValidation": "Strict"}
        if on_conflict == "take":
            query["force"] = "true"
        path = self._get_path(document["kind"], document["metadata"]["name"])
        code, held = self._call("PATCH", path, document["kind"], query=query, body=document, content_type=_APPLY)
        return Applied(is_new=code == 201, document=held)

    def get(self, kind: str, name: str) -> Manifest | None:
        """Return an object, or None if there is none.

        Raises:
            ServerLostError, ClusterError: as for `apply`.
        """
        return self._call("GET", self._get_path(kind, name), kind, absent_ok=True)[1] or None

    def exists(self, kind: str, name: str) -> bool:
        """Tell whether there is such an object; what it holds (a Secret's values) is not sent.

        Raises:
            ServerLostError, ClusterError: as for `apply`.
        """
        return bool(self._call("GET", self._get_path(kind, name), kind, accept=_METADATA_ONLY, absent_ok=True)[1])

    def list_pods(self, selector: str) -> list[Manifest]:
        """Return the pods with these labels, oldest first.

        Raises:
            ServerLostError, ClusterError: as for `apply`.
        """
        pods = self._list("Pod", {"labelSelector": selector})
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def list_warnings(self) -> list[Manifest]:
        """Return the Warning events of the namespace that are still kept (an hour, usually).

        Raises:
            ServerLostError, ClusterError: as for `apply`.
        """
        return self._list("Event", {"fieldSelector": "type=Warning", "resourceVersion": "0"})  # 0: what it has at hand

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object and what it owns; False if there is none.

        Raises:
            ServerLostError, ClusterError: as for `apply`.
        """
        query = {"propagationPolicy": "Background"}
        return bool(self._call("DELETE", self._get_path(kind, name), kind, query=query, absent_ok=True)[1])

    def watch(self, kind: str, name: str) -> Iterator[Manifest | None]:
        """Yield the object now and whenever it changes, None once it is deleted, until the server ends the watch.

        Raises:
            ServerLostError: the connection broke, or nothing came for longer than a watch lasts.
            ClusterError: the server refused.
        """
        query = {"fieldSelector": f"metadata.name={name}"}
        found = self._call("GET", self._get_path(kind), kind, query=query)[1]
        items = cast(list[Manifest], found.get("items") or [])
        yield items[0] if items else None
        query |= {
            "watch": "true",
            "resourceVersion": str(found["metadata"].get("resourceVersion", "")),
            "timeoutSeconds": str(WATCH_S),
        }
        for line in self._stream(self._get_path(kind), kind, query, silent_s=WATCH_S + _SLACK_S):
            try:
                event = cast(dict[str, Any], json.loads(line))
            except ValueError:  # its second half did not come
                raise ServerLostError(f"{self._host} broke off in the middle of an event.") from None
            if event["type"] == "ERROR":  # what we saw last is too old by now
                raise ServerLostError(f"{self._host}: {event['object'].get('message')}.")
            if event["type"] != "BOOKMARK":
                yield None if event["type"] == "DELETED" else event["object"]

    def stream_log(self, pod: str, *, since: str = "", follow: bool = True) -> Iterator[tuple[str, str]]:
        """Yield (time, line) of a pod's log, until it ends or, not following, as far as it goes now.

        Args:
            since: RFC 3339, with which the server leaves out what is older, by whole seconds.

        Raises:
            ServerLostError: the connection broke, or the log said nothing for a while.
            ClusterError: the server refused.
        """
        query = {"timestamps": "true", **({"follow": "true"} if follow else {})}
        query |= {"sinceTime": since} if since else {}
        for line in self._stream(f"{self._get_path('Pod', pod)}/log", "Pod", query, silent_s=LOG_SILENT_S):
            time, _, text = line.partition(" ")
            yield time, text

    def _get_path(self, kind: str, name: str = "") -> str:
        path = PATHS[kind].format(namespace=self.namespace)
        return f"{path}/{name}" if name else path

    def _list(self, kind: str, query: dict[str, str]) -> list[Manifest]:
        return cast(list[Manifest], self._call("GET", self._get_path(kind), kind, query=query)[1].get("items") or [])

    def _call(
        self,
        method: str,
        path: str,
        kind: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        accept: str = _JSON,
        absent_ok: bool = False,
    ) -> tuple[int, Manifest]:
        headers = {"Accept": accept, **({"Content-Type": content_type} if body is not None else {})}
        response = self._send(method, path, query or {}, body, headers, timeout_s=(_TIMEOUT_S, _TIMEOUT_S))
        with self._reach():
            text = response.read().decode()
        if not 200 <= response.status <= 299:
            status = _parse_status(text)
            is_absent = response.status == 404 and cast(Any, status.get("details") or {}).get("name")
            if absent_ok and is_absent:
                return response.status, {}
            raise self._explain(response.status, status, kind)
        try:
            return response.status, cast(Manifest, json.loads(text))
        except ValueError:
            raise ServerLostError(f"{self._host} answered with what is no JSON: {text[:80]!r}.") from None

    def _stream(self, path: str, kind: str, query: dict[str, str], *, silent_s: float) -> Iterator[str]:
        """Yield the lines of an answer that goes on.

        Args:
            silent_s: so long without a byte, and the connection is given up.
        """
        response = self._send("GET", path, query, None, {"Accept": _JSON}, timeout_s=(_TIMEOUT_S, silent_s))
        if not 200 <= response.status <= 299:
            with self._reach():
                text = response.read().decode()
            raise self._explain(response.status, _parse_status(text), kind)
        rest = b""
        try:
            with self._reach():
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
        headers: dict[str, str],
        *,
        timeout_s: tuple[float, float],
    ) -> Any:
        with self._reach():
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

    def _explain(self, code: int, status: dict[str, Any], kind: str) -> ClusterError:
        return explain(code, status, kind, host=self._host, namespace=self.namespace)

    @contextlib.contextmanager
    def _reach(self) -> Generator[None]:
        """Turn what the client raises for a connection that fails into one error of ours."""
        from urllib3.exceptions import HTTPError  # noqa: PLC0415 (comes with the client)

        try:
            yield
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise ServerLostError(
                f"{self._host} cannot be reached: {error}. Check the network and the kubeconfig."
            ) from error


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


def _parse_status(text: str) -> dict[str, Any]:
    try:
        status: Any = json.loads(text)
    except ValueError:
        return {"message": " ".join(text.split())[:200]}
    return cast(dict[str, Any], status) if isinstance(status, dict) else {}
