"""The head that RAY_ADDRESS names, looked at before Ray connects: Ray itself waits for minutes, deaf to Ctrl-C.

No Ray here. A head speaks gRPC, so HTTP/2: it answers the first bytes of a connection with its settings, whatever its
version, and before any token is asked for.
"""

import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from elastic.errors import ConfigError

ADDRESS = "RAY_ADDRESS"
PORT = 6379
PROBE_S = 10.0
_RETRY_S = 0.5
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""An HTTP/2 client's first words, and empty settings. Source: RFC 9113, 3.4 and 6.5."""
_SETTINGS = 4
_FRAME_HEADER_BYTES = 9

Answer = Literal["head", "closed", "silent", "unknown host", "other"]
"""Who is there: `closed`: nobody listens; `silent`: nothing came back in time; `other`: no gRPC."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a cluster is joined."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_address(text: str) -> Head | Literal["auto", "local"]:
    """Return what RAY_ADDRESS means for a driver; empty is a cluster of our own on this machine, as `local`.

    Raises:
        ConfigError: it is no address of a head.
    """
    if text in ("", "local"):
        return "local"
    if text == "auto":
        return "auto"
    found = f"{ADDRESS}={text}"
    scheme, is_url, _ = text.partition("://")
    if is_url and scheme in ("http", "https"):
        raise ConfigError(
            f"{found} is a dashboard's address, where runs are submitted, and no head's. Use `solvent submit --to ray "
            f"--address {text}`, or set {ADDRESS}=HOST:{PORT} on a machine of the cluster."
        )
    if is_url:
        raise ConfigError(
            f"{found}: a driver must be on a machine of the cluster, and {scheme}:// is for clients outside. Set "
            f"{ADDRESS}=HOST:{PORT} on a node, or use `solvent submit --to ray` from outside."
        )
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:/\s\[\]]+):(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"{found} is no address. Set HOST:PORT, such as 10.0.0.5:{PORT}, or unset it to train here.")
    return Head(host=match[1].strip("[]"), port=int(match[2]))


def check_head(head: Head, env: Mapping[str, str], *, limit_s: float = PROBE_S) -> None:
    """Return once a head answers there.

    Args:
        env: with RAY_USE_TLS in it, only the connection is tried.

    Raises:
        ConfigError: none does within the limit; with what was found instead.
    """
    answer = probe(head, limit_s=limit_s, speaks_tls=env.get("RAY_USE_TLS", "0").lower() in ("1", "true"))
    if answer != "head":
        hint = f"Start the head there (solvent nodes head), correct {ADDRESS}, or unset it to train on this machine."
        raise ConfigError(f"{ADDRESS}={head}: {_describe(answer, head, limit_s)}. {hint}")


def _describe(answer: Answer, head: Head, limit_s: float) -> str:
    match answer:
        case "closed":
            return "nobody listens there, so no cluster can be joined"
        case "silent":
            return f"nothing answers within {limit_s:g} s (a firewall, or a machine that is gone)"
        case "unknown host":
            return f"there is no host {head.host} that is known here"
        case _:
            return f"something answers there, but no Ray head: a dashboard's port is not the head's, which is {PORT}"


def probe(head: Head, *, limit_s: float, speaks_tls: bool = False) -> Answer:
    """Return who answers at an address, within the limit; one that refuses is tried again until then.

    In a thread of its own, because a name server may be silent for longer, and Ctrl-C must end the wait.
    """
    answers: list[Answer] = []
    deadline_s = time.monotonic() + limit_s

    def ask() -> None:
        answer: Answer = "closed"
        while time.monotonic() < deadline_s:
            answer = _ask(head, deadline_s=deadline_s, speaks_tls=speaks_tls)
            if answer != "closed":
                break
            time.sleep(_RETRY_S)
        answers.append(answer)

    thread = threading.Thread(target=ask, name="probe", daemon=True)
    thread.start()
    thread.join(limit_s + _RETRY_S)
    return answers[0] if answers else "silent"


_MEANING: tuple[tuple[type[OSError], Answer], ...] = (
    (TimeoutError, "silent"),
    (socket.gaierror, "unknown host"),
    (ConnectionRefusedError, "closed"),
    (ConnectionResetError, "other"),
    (OSError, "silent"),  # no route, or no network
)


def _ask(head: Head, *, deadline_s: float, speaks_tls: bool) -> Answer:
    try:
        with socket.create_connection((head.host, head.port), timeout=_left_s(deadline_s)) as link:
            return "head" if speaks_tls or _greet(link, deadline_s=deadline_s) else "other"
    except OSError as error:
        return next(answer for kind, answer in _MEANING if isinstance(error, kind))


def _greet(link: socket.socket, *, deadline_s: float) -> bool:
    """Tell whether the other end speaks HTTP/2: its first frame is its settings."""
    link.sendall(_HELLO)
    said = b""
    while len(said) < _FRAME_HEADER_BYTES:
        link.settimeout(_left_s(deadline_s))
        data = link.recv(_FRAME_HEADER_BYTES - len(said))
        if not data:
            return False
        said += data
    return said[3] == _SETTINGS and said[5:] == bytes(4)


def _left_s(deadline_s: float) -> float:
    return max(0.05, deadline_s - time.monotonic())
