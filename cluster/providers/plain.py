"""Any machine: SIGTERM, a notice file and an HTTP hook, so that a script can say what no provider does. Always read.

The file is `$SOLVENT_NOTICE_FILE`, else `solvent-notice-<uid>` in the temporary directory (for one of several Ray
nodes on a machine: with `-<first 12 digits of its id>` added). It holds the seconds that are left when it is written,
or the time of the end (RFC 3339). Writing it again moves the deadline, removing it withdraws the notice. One line in
the script that holds Ray makes its signal a notice with the true lead time, here 25 s:

    ray start --block --address=HEAD:6379 & trap 'echo 25 > /tmp/solvent-notice-0' TERM; wait; wait

The hook is open if the machine has SOLVENT_NOTICE_HOOK=PORT:TOKEN in its environment. It listens on the loop-back
interface only:

    curl -X POST -H "Authorization: Bearer TOKEN" -d '{"seconds_left": 25}' http://127.0.0.1:PORT/notice

`deadline` (RFC 3339) may stand for `seconds_left`, and `reason` beside it; `-X DELETE` withdraws.
"""

import json
import math
import os
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from cluster.providers._base import Evidence, Feed, Machine, NodeNotice, parse_time
from cluster.providers._sigterm import open_sigterm_feed
from elastic.errors import NoticeError

_STALE_S = 60.0
"""A file whose deadline has passed for this long was left behind by the machine's last life."""
_MOST_BYTES = 4096


def detect(machine: Machine) -> Evidence:  # noqa: ARG001 (every provider's signature)
    """Every machine is one."""
    return Evidence(is_here=True, why="always: SIGTERM, the notice file and the hook need no provider")


def open_feeds(machine: Machine) -> list[Feed]:
    """Read the signal, the files and the hook."""
    # Nobody knows better than Ray's setting here; a provider that does is read beside this, and the earlier end counts.
    feeds = [open_sigterm_feed(machine, get_grace_s=lambda: machine.grace_s or math.inf)]
    feeds += [_open_file(machine, path) for path in get_notice_files(machine)]
    if hook := machine.env.get("SOLVENT_NOTICE_HOOK"):
        feeds.append(_open_hook(machine, hook))
    return feeds


def get_notice_files(machine: Machine) -> list[Path]:
    """Return the paths of the notice files: the machine's, and the node's own."""
    path = Path(machine.env.get("SOLVENT_NOTICE_FILE") or machine.folder / f"solvent-notice-{os.getuid()}")
    return [path, path.with_name(f"{path.name}-{machine.node[:12]}")] if machine.node else [path]


def _open_file(machine: Machine, path: Path) -> Feed:
    return Feed(name=str(path), every_s=0.25, read=lambda: read_file(path, now_s=machine.now_s()))


def read_file(path: Path, *, now_s: float) -> Sequence[NodeNotice]:
    """Read a notice file.

    Raises:
        NoticeError: it says nothing that can be understood, is left over from long ago, or is another user's.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8", errors="replace").strip()
            stat = os.fstat(file.fileno())
    except FileNotFoundError:
        return []
    if stat.st_uid not in (0, os.getuid()):  # anybody may write into the temporary directory
        raise NoticeError(
            f"{path} belongs to user {stat.st_uid}, so it is not believed. Write it as user {os.getuid()}."
        )
    if not text:  # it is being written
        return []
    deadline_s = parse_file(text, written_s=stat.st_mtime, what=str(path))
    if deadline_s < now_s - _STALE_S:
        raise NoticeError(f"{path} names a time {now_s - deadline_s:.0f} s ago, so it is left over. Remove it.")
    return [NodeNotice(id="file", reason=f"notice file {path.name}", deadline_s=deadline_s)]


def parse_file(text: str, *, written_s: float, what: str) -> float:
    """Return the deadline (Unix seconds) that a notice file names.

    Raises:
        NoticeError: it holds neither seconds nor a time.
    """
    try:
        return written_s + _parse_seconds(float(text), what=what)
    except ValueError:
        return parse_time(text, what=what)


def parse_hook(body: bytes, *, now_s: float) -> NodeNotice:
    """Read the body of `POST /notice`.

    Raises:
        NoticeError: it is no JSON object with `seconds_left` or `deadline`.
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or ("seconds_left" in fields) == ("deadline" in fields):
        raise NoticeError('the body must be a JSON object with "seconds_left" or "deadline".')
    fields = cast(dict[str, Any], fields)
    if "deadline" in fields:
        deadline_s = parse_time(fields["deadline"], what="deadline")
    elif isinstance(fields["seconds_left"], int | float):
        deadline_s = now_s + _parse_seconds(fields["seconds_left"], what="seconds_left")
    else:
        raise NoticeError(f"seconds_left={fields['seconds_left']!r} is no number.")
    return NodeNotice(id="hook", reason=str(fields.get("reason", "told by the hook"))[:200], deadline_s=deadline_s)


def _parse_seconds(seconds: float, *, what: str) -> float:
    if not 0 <= seconds < math.inf:
        raise NoticeError(f"{what}={seconds} must be finite seconds, 0 or more.")
    return float(seconds)


def _open_hook(machine: Machine, hook: str) -> Feed:
    """Listen on a port of the loop-back interface.

    Raises:
        NoticeError: the setting is no PORT:TOKEN, or the port is taken.
    """
    port, _, token = hook.partition(":")
    if not port.isdecimal() or int(port) > 65535 or len(token) < 8:
        raise NoticeError("SOLVENT_NOTICE_HOOK must be PORT:TOKEN, the token at least 8 characters long.")
    held: list[NodeNotice] = []

    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0

        def do_POST(self) -> None:
            if not self._is_allowed():
                return
            try:
                length = min(int(self.headers.get("Content-Length") or 0), _MOST_BYTES)
                held[:] = [parse_hook(self.rfile.read(length), now_s=machine.now_s())]
            except (NoticeError, ValueError) as error:
                self._answer(400, {"error": str(error)})
            else:
                self._answer(200, {"deadline_s": held[0].deadline_s})

        def do_DELETE(self) -> None:
            if self._is_allowed():
                held.clear()
                self._answer(200, {})

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is the base class's)
            """Say nothing: the watch tells what it learns."""

        def _is_allowed(self) -> bool:
            given = self.headers.get("Authorization", "").encode()
            if self.path != "/notice":
                self._answer(404, {"error": "there is only /notice"})
            elif not secrets.compare_digest(given, f"Bearer {token}".encode()):
                self._answer(401, {"error": "send Authorization: Bearer TOKEN, with the token of SOLVENT_NOTICE_HOOK"})
            else:
                return True
            return False

        def _answer(self, status: int, fields: dict[str, Any]) -> None:
            body = json.dumps(fields).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    except OSError as error:
        raise NoticeError(f"the notice hook cannot listen on port {port}: {error}. Use another port.") from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), name="notice-hook", daemon=True).start()

    def close() -> None:
        server.shutdown()
        server.server_close()

    return Feed(name=f"hook on port {port}", every_s=0.1, read=lambda: list(held), close=close)
