"""Servers that speak what providers document about their notices, and refuse what the real ones refuse.

Each has `give(seconds)`, which publishes a notice and returns its deadline, and `withdraw()`.
"""

import email.utils
import json
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Server:
    """An HTTP server in a thread; subclasses answer."""

    skew_s = 0.0
    """How far its clock is ahead."""
    fault: tuple[int, str] | None = None
    """An answer to everything, while it lasts."""

    def __init__(self) -> None:
        server = self
        self.lock = threading.Condition()
        self.requests: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.requests.append((self.command, self.path))
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                headers = {name.lower(): value for name, value in self.headers.items()}
                if server.fault:
                    status, text, more = *server.fault, {"Content-Type": "text/html"}
                else:
                    status, text, more = server.answer(self.command, parts.path, query, headers, body)
                try:
                    self.send_response_only(status)
                    self.send_header("Date", email.utils.formatdate(time.time() + server.skew_s, usegmt=True))
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:  # who asked has gone
                    pass

            do_GET = do_PUT = do_POST = handle_any  # noqa: N815 (the names are those of the base class)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, query, headers, body) -> tuple[int, str, dict[str, str]]:
        raise NotImplementedError

    def to_rfc3339(self, our_s: float) -> str:
        return datetime.fromtimestamp(our_s + self.skew_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def in_whole_seconds(seconds: float) -> float:
    return float(round(time.time() + seconds))


class Aws(Server):
    """IMDSv2: nothing without a session token."""

    num_tokens = 0
    instance_action: str | None = None
    rebalance: str | None = None

    def __init__(self) -> None:
        self.tokens: set[str] = set()
        super().__init__()

    def get_env(self) -> dict[str, str]:
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url}

    def give(self, seconds: float) -> float:
        deadline_s = in_whole_seconds(seconds)
        self.instance_action = json.dumps({"action": "terminate", "time": self.to_rfc3339(deadline_s)})
        return deadline_s

    def withdraw(self) -> None:
        self.instance_action = None

    def answer(self, method, path, query, headers, body):
        if path == "/latest/api/token":
            ttl = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not ttl.isdecimal() or not 1 <= int(ttl) <= 21600:
                return 400, "", {}
            self.num_tokens += 1
            self.tokens = {*self.tokens, f"token-{self.num_tokens}"}
            return 200, f"token-{self.num_tokens}", {"X-aws-ec2-metadata-token-ttl-seconds": ttl}
        if headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return 401, "", {}
        found = {
            "/latest/meta-data/spot/instance-action": self.instance_action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }.get(path)
        return (200, found, {}) if found else (404, "<html>404 - Not Found</html>", {})


class Gcp(Server):
    """The metadata server holds a request back until the value's ETag is another, or the time is up."""

    def __init__(self) -> None:
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        super().__init__()

    def get_env(self) -> dict[str, str]:
        return {"GCE_METADATA_HOST": self.url.removeprefix("http://")}

    def put(self, name: str, value: str) -> None:
        with self.lock:
            self.values[name] = value
            self.lock.notify_all()

    def give(self, seconds: float) -> float:
        assert seconds == 30, "Google names no time: it is always 30 s"
        self.put("preempted", "TRUE")
        return time.time() + seconds

    def withdraw(self) -> None:
        self.put("preempted", "FALSE")

    def answer(self, method, path, query, headers, body):
        if headers.get("metadata-flavor") != "Google":
            return 403, "Missing Metadata-Flavor:Google header.", {}
        folder, _, name = path.rpartition("/")
        if folder != "/computeMetadata/v1/instance" or name not in self.values:
            return 404, "", {}

        def get_etag() -> str:
            return f"{sum(self.values[name].encode()):016x}"

        with self.lock:
            if query.get("wait_for_change") == "true":
                last_etag = query.get("last_etag", get_etag())
                self.lock.wait_for(lambda: get_etag() != last_etag, timeout=float(query.get("timeout_sec", 600)))
            return 200, self.values[name], {"ETag": get_etag(), "Metadata-Flavor": "Google"}


class Azure(Server):
    """Scheduled events of a scale set. Who asks for its name gets the next of the names; the last one is for all."""

    name = "trainers_3"

    def __init__(self, *names: str) -> None:
        self.names = [*names, self.name]
        self.events: list[dict] = []
        self.incarnation = 1
        self.started: list[str] = []
        self.started_s: list[float] = []
        super().__init__()

    def get_env(self) -> dict[str, str]:
        return {"SOLVENT_AZURE_METADATA": self.url}

    def put(self, *events: dict) -> None:
        self.events = list(events)
        self.incarnation += 1

    def build_event(self, deadline_s: float, **fields) -> dict:
        return {
            "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
            "EventType": "Preempt",
            "ResourceType": "VirtualMachine",
            "Resources": [self.name],
            "EventStatus": "Scheduled",
            "NotBefore": email.utils.formatdate(deadline_s + self.skew_s, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
            **fields,
        }

    def give(self, seconds: float) -> float:
        deadline_s = in_whole_seconds(seconds)
        self.put(self.build_event(deadline_s))
        return deadline_s

    def withdraw(self) -> None:
        self.put()

    def answer(self, method, path, query, headers, body):
        if headers.get("metadata") != "true":
            return 400, '{"error": "Bad request. Required metadata header not specified"}', {}
        if path == "/metadata/instance/compute/name" and query.get("format") == "text":
            with self.lock:
                return 200, self.names.pop(0) if len(self.names) > 1 else self.name, {}
        if path != "/metadata/scheduledevents" or query.get("api-version") != "2020-07-01":
            return 404, "", {}
        if method == "POST":
            self.started += [request["EventId"] for request in json.loads(body)["StartRequests"]]
            self.started_s.append(time.time())
            self.put(*[{**e, "EventStatus": "Started", "NotBefore": ""} for e in self.events])
            return 200, "", {}
        return 200, json.dumps({"DocumentIncarnation": self.incarnation, "Events": self.events}), {}


class Kubernetes(Server):
    """An API server that lets one service account get one pod and one node."""

    def __init__(self, root: Path) -> None:
        self.taints: list[dict] = []
        self.labels: dict[str, str] = {"kubernetes.io/hostname": "gke-1"}
        self.deletion: str | None = None
        self.grace_s = 25
        account = root / "var/run/secrets/kubernetes.io/serviceaccount"
        account.mkdir(parents=True)
        (account / "token").write_text("secret\n")
        (account / "namespace").write_text("train")
        super().__init__()

    def get_env(self) -> dict[str, str]:
        return {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "SOLVENT_KUBERNETES_URL": self.url,
            "HOSTNAME": "worker-0",
            "NODE_NAME": "gke-1",
        }

    def give(self, seconds: float) -> float:
        deadline_s = in_whole_seconds(seconds)
        self.deletion = self.to_rfc3339(deadline_s)
        return deadline_s

    def withdraw(self) -> None:
        self.deletion = None

    def answer(self, method, path, query, headers, body):
        if headers.get("authorization") != "Bearer secret":
            return 401, '{"kind": "Status", "code": 401}', {}
        if path == "/api/v1/namespaces/train/pods/worker-0":
            metadata = {"name": "worker-0", **({"deletionTimestamp": self.deletion} if self.deletion else {})}
            spec = {"terminationGracePeriodSeconds": self.grace_s}
            return 200, json.dumps({"kind": "Pod", "metadata": metadata, "spec": spec}), {}
        if path == "/api/v1/nodes/gke-1":
            node = {"kind": "Node", "metadata": {"labels": self.labels}, "spec": {"taints": self.taints}}
            return 200, json.dumps(node), {}
        return 403, '{"kind": "Status", "code": 403}', {}
