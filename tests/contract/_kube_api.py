"""An API server of Kubernetes over real HTTP: server-side apply with owned fields, rights, watches, logs, events.

KubeRay's operator adopts every new job; its states are moved by hand. What is taken is what Kubernetes' own schemas
take (and KubeRay's, where they lie beside the repository). See `_kube_objects` for what the fields do.
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

from tests.contract._kube_objects import OPERATOR, ConflictsError, Fields, find_keys, write_as_operator

SCHEMA = Path(__file__).parents[3] / "shared" / "schemas" / "rayjob-v1.schema.json"
PLURALS = {
    "rayjobs": "RayJob",
    "configmaps": "ConfigMap",
    "networkpolicies": "NetworkPolicy",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "priorityclasses": "PriorityClass",
    "podmonitors": "PodMonitor",
    "pods": "Pod",
    "events": "Event",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "serviceaccounts": "ServiceAccount",
    "secrets": "Secret",
}
TOKEN = "the-token-of-the-kubeconfig"


class KubeApi:
    """`with KubeApi() as api`; what it should do wrong is set on it."""

    def __init__(self):
        self.objects = {}
        self.fields = Fields()
        self.logs = {}
        self.requests = []
        self.version = 1
        self.told_version = 0
        """The newest version that somebody has listed or watched."""
        self.changed = threading.Condition()
        self.refusals = {}
        """kind -> (HTTP code, message, details) for every request about it."""
        self.refuses_to_create = {}
        """The same for what is applied only."""
        self.stumbles = []
        """HTTP codes (429, 5xx) of the next answers; None: that one is as it should be."""
        self.missing = set()
        self.undeclared = set()
        """Fields that the CRD, which is an older one, does not have."""
        self.rights = None
        """Rules of a Role in the namespace; None: everything is allowed."""
        self.cuts = {"watch": 0, "log": 0}
        """So many watches and logs end in the middle of a line."""
        self.silences = {"watch": 0, "log": 0}
        """So many say nothing more after what they begin with, and do not end."""
        self.num_lines = 0
        """Of logs, that were sent whole."""
        self.forget_versions = False
        """Each watch is told that what it knows is too old, once."""
        self.finalizer_s = 0.0
        self.is_over = False
        self.http = self.open(0)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def open(self, port):
        http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"api": self}))
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return http

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.is_over = True
        with self.changed:
            self.changed.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def go_away(self, seconds):
        """Break every connection and refuse new ones for a while."""
        port = self.http.server_address[1]
        self.close()
        time.sleep(seconds)
        self.is_over = False
        self.http = self.open(port)

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

    def update(self, kind, name, obj, *, manager):
        """Write all of an object back, as `kubectl apply`, `kubectl edit` and operators do."""
        return self.put(
            kind, name, self.fields.update((kind, name), self.objects.get((kind, name)), obj, manager=manager)
        )

    def adopt(self, name):
        """Do what KubeRay's operator does to a new job."""
        self.update("RayJob", name, write_as_operator(self.objects["RayJob", name]), manager=OPERATOR)

    def drop(self, kind, name):
        with self.changed:
            self.version += 1
            self.fields.owners.pop((kind, name), None)
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

    def warn(self, kind, name, reason, message, *, time_utc="2026-11-25T00:00:00Z"):
        """Record a Warning event about an object."""
        about = {"involvedObject": {"kind": kind, "name": name}, "type": "Warning", "lastTimestamp": time_utc}
        self.put("Event", f"{name}.{self.version}", {**about, "reason": reason, "message": message})


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
        self.is_log = parts[-1] == "log"
        with contextlib.suppress(_RefusedError, ConnectionError):
            if self.api.stumbles:
                code = self.api.stumbles.pop(0)
                if code is not None:
                    self.refuse(code, f"the server is not well ({code})")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(401, "Unauthorized")
            kind = PLURALS.get(plural)
            if kind is None or kind in self.api.missing:
                self.refuse(404, "the server could not find the requested resource", {})
            self.authorize(plural, name, self.get_verb(name))
            if kind in self.api.refusals:
                self.refuse(*self.api.refusals[kind])
            act(kind, name)

    def get_verb(self, name):
        if self.command == "GET":
            return "watch" if self.query.get("watch") else "get" if name else "list"
        return {"PATCH": "patch", "DELETE": "delete"}[self.command]

    def authorize(self, plural, name, verb):
        """Ask the Role, if there is one: rights of a namespace say nothing of what belongs to the whole cluster."""
        if self.api.rights is None:
            return
        resource = "pods/log" if self.is_log else plural
        is_allowed = plural != "priorityclasses" and any(
            resource in rule["resources"] and verb in rule["verbs"] and name in rule.get("resourceNames", [name])
            for rule in self.api.rights
        )
        if not is_allowed:
            where = "at the cluster scope" if plural == "priorityclasses" else 'in the namespace "default"'
            said = f'User "ci" cannot {verb} resource "{resource}" in API group "" {where}'
            self.refuse(403, f'{plural} "{name}" is forbidden: {said}', {"name": name})

    def answer(self, code, fields):
        body = json.dumps(fields).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, message, details=None):
        self.answer(code, {"kind": "Status", "code": code, "message": message, "details": details or {}})
        raise _RefusedError

    def refuse_absent(self, kind, name):
        self.refuse(404, f'{kind} "{name}" not found', {"name": name, "kind": kind})

    def apply(self, kind, name):
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        assert self.query["fieldValidation"] == "Strict"
        manager, obj = self.query["fieldManager"], json.loads(self.body)
        held = self.api.objects.get((kind, name))
        if held is None:  # whoever may patch only may not create
            self.authorize(next(plural for plural, k in PLURALS.items() if k == kind), name, "create")
        if kind in self.api.refuses_to_create:
            self.refuse(*self.api.refuses_to_create[kind])
        for field, path in find_keys(obj):
            if field in self.api.undeclared:
                said = f"failed to create typed patch object (default/{name}; ray.io/v1, Kind={kind})"
                self.refuse(500, f"{said}: {path}: field not declared in schema")
        self.check(kind, obj)
        try:
            force = self.query.get("force") == "true"
            made = self.api.fields.apply((kind, name), held, obj, manager=manager, force=force)
        except ConflictsError as conflicts:
            self.refuse(409, str(conflicts))
        kept = self.api.put(kind, name, made)
        self.answer(200 if held else 201, kept)
        if kind == "RayJob" and not held:
            self.api.adopt(name)

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
        if kind == "RayJob" and self.api.objects[kind, name]["metadata"].get("finalizers"):
            obj = self.api.objects[kind, name]
            meta = {**obj["metadata"], "deletionTimestamp": "2026-11-25T00:00:00Z"}
            self.api.put(kind, name, {**obj, "metadata": meta})
            threading.Timer(self.api.finalizer_s, self.api.drop, (kind, name)).start()
        else:
            self.api.drop(kind, name)
        self.answer(200, {"kind": "Status", "status": "Success"})

    def get(self, kind, name):
        if self.is_log:
            self.stream_log(name)
        elif self.query.get("watch"):
            self.watch(kind)
        elif name:
            if (kind, name) not in self.api.objects:
                self.refuse_absent(kind, name)
            obj = self.api.objects[kind, name]
            if "PartialObjectMetadata" in self.headers["Accept"]:
                obj = {"kind": "PartialObjectMetadata", "metadata": obj["metadata"]}
            self.answer(200, obj)
        else:
            with self.api.changed:
                items = [obj for (k, _), obj in self.api.objects.items() if k == kind and self.is_selected(obj)]
                self.api.told_version = self.api.version if kind == "RayJob" else self.api.told_version
                self.answer(200, {"items": items, "metadata": {"resourceVersion": str(self.api.version)}})

    def is_selected(self, obj):
        key, _, value = self.query.get("labelSelector", "").partition("=")
        labels = obj["metadata"].get("labels", {})
        field, _, wanted = self.query.get("fieldSelector", "").partition("=")
        found = {"metadata.name": obj["metadata"]["name"], "type": obj.get("type")}.get(field)
        return (not key or labels.get(key) == value) and (not field or found == wanted)

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

    def keep_silent(self, stream):
        """Send nothing more, and do not end, as a connection does that a router has forgotten."""
        if not self.api.silences[stream]:
            return False
        self.api.silences[stream] -= 1
        with self.api.changed:
            self.api.changed.wait_for(lambda: self.api.is_over, timeout=120)
        return True

    def watch(self, kind):
        name = self.query["fieldSelector"].partition("=")[2]
        self.start_stream()
        if self.api.forget_versions:
            self.api.forget_versions = False
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            self.send_line(json.dumps({"type": "ERROR", "object": gone}), "watch")
            return self.end_stream()
        if self.keep_silent("watch"):
            return None
        known = int(self.query["resourceVersion"])
        end_s = time.monotonic() + int(self.query["timeoutSeconds"])
        while True:
            with self.api.changed:
                has_news = self.api.changed.wait_for(
                    partial(self.is_news, kind, name, known), timeout=end_s - time.monotonic()
                )
                obj = self.api.objects.get((kind, name))
                if self.api.is_over:
                    return None
                if not has_news:
                    return self.end_stream()
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
        if ("Pod", pod) not in self.api.objects:
            self.refuse_absent("Pod", pod)
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
            if "follow" in self.query and self.keep_silent("log"):
                return None
            if self.api.is_over or "follow" not in self.query or (is_over and not lines):
                return self.end_stream()
