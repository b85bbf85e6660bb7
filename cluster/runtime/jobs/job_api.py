"""Ray's job API over HTTP: the few calls that a submission needs, each bounded in time. No Ray is imported here.

Ray's own client (`ray.job_submission`) waits for ever on a connection that died silently, and takes a second to import.
The addresses are those of Ray 2.60's `dashboard/modules/job/job_head.py`; tests/ray/test_submit.py runs against it.
"""

import hashlib
import http.client
import importlib.metadata
import ipaddress
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote, urlsplit

from cluster.runtime.ray.ray_token import TOKEN
from elastic.errors import ClusterError, ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_GCS_PORT = 6379
_SUBMIT_S = 60.0
"""A head that has just started looks for its own agent first."""
_UPLOAD_S = 300.0
_SILENCE_S = 30.0
"""A connection that shows a log is asked for a sign of life this often."""


class ServerLostError(Exception):
    """The dashboard cannot be reached, or gave no answer in time; what was asked may have happened."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission, as the cluster tells of it."""

    id: str
    status: str
    """PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED"""
    message: str = ""
    error_type: str = ""
    exit_code: int | None = None
    """Of the driver; None if it never started, was stopped or is gone without a word."""
    start_ms: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def has_ended(self) -> bool:
        """Whether its status is final."""
        return self.status in ENDED


class JobServer:
    """The dashboard of one cluster.

    Args:
        address: `http://HOST:PORT` or `https://...`.
        token: Ray's; empty for a cluster without.
        ask_s: how long an answer may take.

    Raises:
        ConfigError: no such address, or the token would travel in the clear.
    """

    def __init__(self, address: str, *, token: str, ask_s: float = 15.0) -> None:
        self.address = _check_address(address, has_token=bool(token))
        self._ask_s = ask_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def check_version(self) -> None:
        """Refuse a cluster of another Ray than ours: trainers and the driver lean on its internals.

        Raises:
            ClusterError: another version.
            ServerLostError: no answer.
        """
        theirs = str(self._ask("GET", "/api/version").get("ray_version", ""))
        ours = importlib.metadata.version("ray")
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise ClusterError(
                f"{self.address} runs ray {theirs or '(it does not say which)'}, and Solvent here was tested with "
                f"{ours}. Install the same on all machines."
            )

    def list_jobs(self) -> list[Job]:
        """Return all submissions that the cluster remembers, oldest first.

        Raises:
            ClusterError: the server refused.
            ServerLostError: no answer.
        """
        rows = cast(list[dict[str, Any]], self._ask("GET", "/api/jobs/"))
        return sorted((_parse(row) for row in rows if row.get("submission_id")), key=lambda job: job.start_ms)

    def get(self, job: str) -> Job | None:
        """Return a submission; None if the cluster does not know it (a head that was started anew knows none).

        Raises:
            ClusterError, ServerLostError: as for `list_jobs`.
        """
        status, body = self._request("GET", f"/api/jobs/{quote(job)}")
        if status == 404:
            return None
        return _parse(self._read(status, body))

    def submit(self, job: str, *, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
        """Start a job under an id of ours; False if the id is taken, by an earlier try of ours or by somebody else.

        Raises:
            ClusterError, ServerLostError: as for `list_jobs`.
        """
        fields = {"entrypoint": entrypoint, "submission_id": job, "runtime_env": runtime_env, "metadata": metadata}
        status, body = self._request("POST", "/api/jobs/", body=json.dumps(fields).encode(), timeout_s=_SUBMIT_S)
        if status >= 400 and b"already exists" in body:
            return False
        self._read(status, body)
        return True

    def stop(self, job: str) -> None:
        """Ask for a job's end, and do not wait for it.

        Raises:
            ClusterError, ServerLostError: as for `list_jobs`.
        """
        self._ask("POST", f"/api/jobs/{quote(job)}/stop")

    def upload(self, package: bytes) -> str:
        """Store a zip file unless the cluster has it; return the URI under which nodes find it.

        Raises:
            ClusterError, ServerLostError: as for `list_jobs`.
        """
        name = f"_ray_pkg_{hashlib.sha1(package, usedforsecurity=False).hexdigest()}.zip"
        status, body = self._request("GET", f"/api/packages/gcs/{name}")
        if status != 200:
            status, body = self._request("PUT", f"/api/packages/gcs/{name}", body=package, timeout_s=_UPLOAD_S)
            self._check(status, body)
        return f"gcs://{name}"

    async def tail_log(self, job: str) -> AsyncIterator[str]:
        """Yield a job's log from its start, in pieces, until the job has ended.

        Raises:
            ServerLostError: the connection broke, or the server is not ready to show it.
        """
        import aiohttp  # noqa: PLC0415 (slow to import, and only who follows needs it)

        url = f"{self.address}/api/jobs/{quote(job)}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers) as session,
                session.ws_connect(url, heartbeat=_SILENCE_S, max_msg_size=0) as stream,
            ):
                async for message in stream:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield str(message.data)
                if stream.close_code != aiohttp.WSCloseCode.OK:
                    raise ServerLostError(f"{self.address} hung up in the middle of the log.")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerLostError(f"{self.address} does not show the log: {error}.") from error

    def _ask(self, method: str, path: str) -> Any:
        return self._read(*self._request(method, path))

    def _read(self, status: int, body: bytes) -> Any:
        self._check(status, body)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ClusterError(
                f"{self.address} answered {body[:80]!r}, which is no JSON: it is not Ray's dashboard. Give --address "
                "http://HEAD:8265 (or a tunnel to it)."
            ) from error

    def _check(self, status: int, body: bytes) -> None:
        if status == 200:
            return
        if status in (401, 403):
            raise ClusterError(
                f"{self.address} does not know us ({_excerpt(body)}). Set {TOKEN} to the head's token, or copy its "
                "~/.ray/auth_token here."
            )
        if status >= 500 and b"status code 400" not in body:  # what the head's agent refused comes as a 500, too
            raise ServerLostError(f"{self.address} is not ready (HTTP {status}: {_excerpt(body)}).")
        raise ClusterError(f"{self.address} refused (HTTP {status}): {_excerpt(body)}")

    def _request(
        self, method: str, path: str, *, body: bytes | None = None, timeout_s: float = 0.0
    ) -> tuple[int, bytes]:
        """Return the status and body of one answer. Not urllib: it would send the token wherever it is redirected."""
        parts = urlsplit(self.address)
        timeout_s = timeout_s or self._ask_s
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
        try:
            headers = {**self._headers, "Content-Type": "application/json"}
            connection.request(method, f"{parts.path}{path}", body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerLostError(f"{self.address} does not answer: {error or type(error).__name__}.") from error
        finally:
            connection.close()


def find_address(named: str, env: Mapping[str, str]) -> str:
    """Return the dashboard that was named, else the environment's, else the one at the near end of a tunnel."""
    for address in (named, env.get("RAY_API_SERVER_ADDRESS", ""), env.get("RAY_ADDRESS", "")):
        if address:
            return address if "://" in address else f"http://{address}"
    return DEFAULT_ADDRESS


def _check_address(address: str, *, has_token: bool) -> str:
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"--address={address} is no http://HOST:PORT. Give the dashboard's: {DEFAULT_ADDRESS}.")
    if port == _GCS_PORT:
        raise ConfigError(
            f"--address={address} is where nodes join; jobs are submitted to the dashboard. Give "
            f"http://{parts.hostname}:8265, or a tunnel to it (ssh -L 8265:127.0.0.1:8265 HEAD)."
        )
    if parts.username or parts.password:
        raise ConfigError(f"--address has a login in it, and command lines are read by many. Set {TOKEN} instead.")
    if parts.scheme == "http" and has_token and _is_public(parts.hostname):
        raise ConfigError(
            f"--address={address} is public, and the token would travel there in the clear. Make a tunnel (ssh -L "
            "8265:127.0.0.1:8265 HEAD) and leave --address out, or put TLS in front and give https://."
        )
    return address.rstrip("/")


def _is_public(host: str) -> bool:
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # the first request says that there is no such host
    return any(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found)


def _parse(row: Mapping[str, Any]) -> Job:
    return Job(
        id=str(row.get("submission_id")),
        status=str(row.get("status")),
        message=str(row.get("message") or ""),
        error_type=str(row.get("error_type") or ""),
        exit_code=row.get("driver_exit_code"),
        start_ms=int(row.get("start_time") or 0),
        metadata=cast(dict[str, str], row.get("metadata") or {}),
    )


def _excerpt(body: bytes) -> str:
    """Return an answer's last line: Ray answers with tracebacks."""
    lines = [line.strip() for line in body.decode(errors="replace").splitlines() if line.strip(" .")]
    return lines[-1][:300].rstrip(".") if lines else "no reason given"
