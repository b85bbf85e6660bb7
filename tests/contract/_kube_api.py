"""An API server of Kubernetes over real HTTP: objects in memory, server-side apply, watches, logs; a KubeRay moved by
hand. It takes what Kubernetes' own schemas take (and KubeRay's, where they lie beside the repository).
"""

import contextlib
import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).parents[3] / "shared" / "schemas" / "rayjob-v1.schema.json"
PLURALS = {
    "rayjobs": "RayJob",
    "configmaps": "ConfigMap",
    "networkpolicies": "NetworkPolicy",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "priorityclasses": "PriorityClass",
    "podmonitors": "PodMonitor",
    "pods": "Pod",
}
TOKEN = "the-token-of-the-kubeconfig"


class KubeApi:
    """`with KubeApi() as api`; what it should do wrong is set on it."""

    def __init__(self):
        self.objects = {}
        self.logs = {}
        self.requests = []
        self.version = 1
        self.told_version = 0
        """The newest version that somebody has listed or watched."""
        self.changed = threading.Condition()
        self.refusals = {}
        """kind -> (HTTP code, message, details) for every request about it."""
        self.missing = set()
        self.owned_by_others = False
        self.cuts = {"watch": 0, "log": 0}
        """So many watches and logs end in the middle of a line."""
        self.num_lines = 0
        """Of logs, that were sent whole."""
        self.forget_versions = False
        """Each watch is told that what it knows is too old, once."""
        self.finalizer_s = 0.0
        handler = type("Handler", (_Handler,), {"api": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.is_over = False

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.is_over = True
        with self.changed:
            self.changed.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def write_kubeconfig(self, path):
        cluster = {"name": "c", "cluster": {"server": self.url}}
        user = {"name": "u", "user": {"token": TOKEN}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "users": [user], "contexts": [context]}
        path.write_text(json.dumps({**config, "current-context": "x"}))

    def put(self, kind, name, obj):
        with self.changed:
            self.version += 1
            meta = {"creationTimestamp": f"2026-11-24T00:00:{self.version % 60:02d}Z", **obj.get("metadata", {})}
            self.objects[kind, name] = {**obj, "metadata": {**meta, "name": name, "resourceVersion": str(self.version)}}
            self.changed.notify_all()
            return self.objects[kind, name]

    def drop(self, kind, name):
        with self.changed:
            self.version += 1
            del self.objects[kind, name]
            self.changed.notify_all()

    def set_status(self, name, **status):
        job = self.objects["RayJob", name]
        self.put("RayJob", name, {**job, "status": {**job.get("status", {}), **status}})

    def wait_for(self, condition, timeout_s=20):
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, self.requests
            time.sleep(0.01)

    def add_log(self, pod, *lines):
        with self.changed:
            kept = self.logs.setdefault(pod, [])
            for line in lines:
                kept.append(f"2026-11-24T00:{len(kept) // 60:02d}:{len(kept) % 60:02d}.5Z {line}")
            self.changed.notify_all()


class _RefusedError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve(self.get)

    def do_PATCH(self):
        self.serve(self.apply)

    def do_DELETE(self):
        self.serve(self.delete)

    def serve(self, act):
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.api.requests.append(f"{self.command} {url.path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = url.path.split("/")
        plural = next((part for part in parts if part in PLURALS), None)
        name = parts[parts.index(plural) + 1] if plural and parts[-1] != plural else ""
        with contextlib.suppress(_RefusedError, ConnectionError):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(401, "Unauthorized")
            kind = PLURALS.get(plural)
            if kind is None or kind in self.api.missing:
                self.refuse(404, "the server could not find the requested resource", {})
            if kind in self.api.refusals:
                self.refuse(*self.api.refusals[kind])
            act(kind, name)

    def answer(self, code, fields):
        body = json.dumps(fields).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, message, details=None):
        self.answer(code, {"kind": "Status", "status": "Failure", "message": message, "code": code, "details": details})
        raise _RefusedError

    def refuse_absent(self, kind, name):
        self.refuse(404, f'{kind} "{name}" not found', {"name": name, "kind": kind})

    def apply(self, kind, name):
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        assert self.query["fieldManager"] == "solvent" and self.query["fieldValidation"] == "Strict"
        obj = json.loads(self.body)
        self.check(kind, obj)
        held = self.api.objects.get((kind, name))
        if held and self.api.owned_by_others and self.query.get("force") != "true":
            self.refuse(409, 'Apply failed with 1 conflict: conflict with "kubectl": .spec.backoffLimit')
        status = {"status": held["status"]} if held and "status" in held else {}
        self.answer(200 if held else 201, self.api.put(kind, name, {**obj, **status}))

    def check(self, kind, obj):
        if kind == "RayJob":
            schema = json.loads(SCHEMA.read_text()) if SCHEMA.is_file() else {}
            problems = [error.message for error in Draft202012Validator(schema).iter_errors(obj)]
        else:
            try:
                problems = []
                if kind != "PodMonitor":
                    kubernetes_validate.validate(obj, "1.32", strict=True)
            except kubernetes_validate.ValidationError as error:
                problems = [str(error.message)]
        if problems:
            self.refuse(422, f"{kind} is invalid: {problems[0]}")

    def delete(self, kind, name):
        if (kind, name) not in self.api.objects:
            self.refuse_absent(kind, name)
        if kind == "RayJob" and self.api.finalizer_s:
            threading.Timer(self.api.finalizer_s, self.api.drop, (kind, name)).start()
        else:
            self.api.drop(kind, name)
        self.answer(200, {"kind": "Status", "status": "Success"})

    def get(self, kind, name):
        if self.path.split("?")[0].endswith("/log"):
            self.stream_log(name)
        elif self.query.get("watch"):
            self.watch(kind)
        elif name:
            if (kind, name) not in self.api.objects:
                self.refuse_absent(kind, name)
            self.answer(200, self.api.objects[kind, name])
        else:
            with self.api.changed:
                items = [obj for (k, _), obj in self.api.objects.items() if k == kind and self.is_selected(obj)]
                self.api.told_version = self.api.version if kind == "RayJob" else self.api.told_version
                self.answer(200, {"items": items, "metadata": {"resourceVersion": str(self.api.version)}})

    def is_selected(self, obj):
        key, _, value = self.query.get("labelSelector", "").partition("=")
        name = self.query.get("fieldSelector", "").partition("=")[2]
        labels = obj["metadata"].get("labels", {})
        return (not key or labels.get(key) == value) and (not name or obj["metadata"]["name"] == name)

    def start_stream(self):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_line(self, line, stream):
        data = line.encode() + b"\n"
        if self.api.cuts[stream]:
            self.api.cuts[stream] -= 1
            self.wfile.write(f"{len(data):x}\r\n".encode() + data[: len(data) // 2])
            raise _RefusedError
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def end_stream(self):
        self.wfile.write(b"0\r\n\r\n")

    def watch(self, kind):
        name = self.query["fieldSelector"].partition("=")[2]
        self.start_stream()
        if self.api.forget_versions:
            self.api.forget_versions = False
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            self.send_line(json.dumps({"type": "ERROR", "object": gone}), "watch")
            return self.end_stream()
        known = int(self.query["resourceVersion"])
        while True:
            with self.api.changed:
                self.api.changed.wait_for(partial(self.is_news, kind, name, known), timeout=10)
                obj = self.api.objects.get((kind, name))
                if self.api.is_over:
                    return None
                known = self.api.version
            kinds = {True: "MODIFIED", False: "DELETED"}
            self.send_line(json.dumps({"type": kinds[obj is not None], "object": obj or {"metadata": {}}}), "watch")
            self.api.told_version = known

    def is_news(self, kind, name, known):
        obj = self.api.objects.get((kind, name))
        return self.api.is_over or obj is None or int(obj["metadata"]["resourceVersion"]) > known

    def has_more(self, pod, sent):
        return self.api.is_over or len(self.api.logs.get(pod, [])) > sent

    def stream_log(self, pod):
        self.start_stream()
        # The server leaves out whole seconds only, as the real one does.
        since = self.query.get("sinceTime", "")[:19]
        sent = 0
        while True:
            with self.api.changed:
                self.api.changed.wait_for(partial(self.has_more, pod, sent), timeout=1)
                lines = self.api.logs.get(pod, [])[sent:]
                sent += len(lines)
                is_over = self.api.objects.get(("Pod", pod), {}).get("status", {}).get("phase") == "Succeeded"
            for line in lines:
                if line[:19] >= since:
                    self.send_line(line, "log")
                    self.api.num_lines += 1
            if self.api.is_over or (is_over and not lines):
                return self.end_stream()
