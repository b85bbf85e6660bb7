"""What every provider's file speaks of: the machine it may look at, its notices, and where it reads them."""

import email.utils
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from elastic.errors import NoticeError

MAX_SKEW_S = 5.0
"""Clocks that differ by more are set against each other; a `Date` is too coarse for less."""
_EXCERPT_CHARS = 80


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Whether this machine is of a provider, and why we believe so."""

    is_here: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class NodeNotice:
    """What a provider says about the future of one node."""

    id: str
    """The same in every reading of the same notice."""
    reason: str
    kind: Literal["leave", "advice"] = "leave"
    """`advice`: the provider thinks that the node may go; nothing is certain, so nobody has to leave."""
    deadline_s: float | None = None
    """Unix time, by our clock, at which the node is gone; None if the provider names none."""
    lead_s: float | None = None
    """Seconds from the first reading until the node is gone, for notices that carry no time."""
    machine: str = ""
    """The provider's name of this machine, if the notice is for several."""
    machines: tuple[str, ...] = ()
    """All machines that leave with this notice; acknowledging it gives every one of them up."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer over HTTP. Header names are in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    received_s: float
    """Unix time by our clock."""

    @property
    def skew_s(self) -> float:
        """How far the server's clock is ahead of ours, from its `Date` header; 0 if that is too little to tell."""
        skew_s = get_date_skew_s(self)
        return skew_s if skew_s is not None and abs(skew_s) > MAX_SKEW_S else 0.0

    def to_our_time(self, server_s: float) -> float:
        """Return a time of the server's clock by ours."""
        return server_s - self.skew_s


@dataclass(frozen=True, kw_only=True)
class SelfDrain:
    """Ray on this node has been told to end (SIGTERM) and drains itself, with a lead time that is only a setting."""

    started_s: float
    """Unix time of the signal."""
    lead_s: float
    """How long Ray waits before it ends, whatever the machine's real grace is."""


class Fetch(Protocol):
    """One HTTP request without redirects or proxies, whose answer may have any status."""

    def __call__(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_s: float = 2.0,
        ca_file: str = "",
    ) -> Response:
        """Return the answer.

        Raises:
            OSError: there was none in time.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This node as a provider's file may see it; tests bring their own."""

    node: str
    """Ray's id of the node; empty outside a cluster."""
    env: Mapping[str, str]
    fetch: Fetch
    now_s: Callable[[], float]
    folder: Path
    """The temporary directory, where notice files lie; see `plain`."""
    root: Path = Path("/")
    """Of the file system."""
    grace_s: float = 0.0
    """What the configuration says about the time from a signal to the end; 0: the provider's usual."""
    get_self_drain: Callable[[], SelfDrain | None] = lambda: None

    def read(self, path: str) -> str:
        """Return a small file's stripped text; empty if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One place at which a provider publishes notices."""

    name: str
    every_s: float
    """Pause between two readings; a reading itself may wait for a change."""
    read: Callable[[], Sequence[NodeNotice]]
    """Return all notices that hold now. Raises OSError (no answer) or NoticeError (one that makes no sense)."""
    url: str = ""
    """What is asked over the network; empty if that is nothing."""
    acknowledge: Callable[[NodeNotice], None] | None = None
    """Tell the provider to go ahead. Raises like `read`."""
    close: Callable[[], None] = lambda: None


class Provider(Protocol):
    """What a file of this package provides."""

    def detect(self, machine: Machine) -> Evidence:
        """Say whether this machine is the provider's. Files and environment only: it must not take time."""
        ...

    def open_feeds(self, machine: Machine) -> list[Feed]:
        """Return where to read notices."""
        ...


# ---- for the parsers


def get_date_skew_s(response: Response) -> float | None:
    """Return how far the `Date` header is ahead of our clock, give or take half a second; None if it says nothing."""
    try:
        date_s = email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()
        return date_s + 0.5 - response.received_s  # its fraction of a second was cut off
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def get_excerpt(response: Response) -> str:
    """Return an answer in a few words, for a message."""
    text = response.body[: 4 * _EXCERPT_CHARS].decode("utf-8", errors="replace")
    return f"HTTP {response.status} {' '.join(text.split())[:_EXCERPT_CHARS]!r}"


def parse_object(response: Response, *, what: str) -> dict[str, Any]:
    """Return the JSON object of an answer with status 200.

    Raises:
        NoticeError: another status, or a body that is no JSON object.
    """
    if response.status != 200:
        raise NoticeError(f"{what} answered {get_excerpt(response)} instead of 200.")
    try:
        value: Any = json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise NoticeError(f"{what} answered {get_excerpt(response)}, which is no JSON.") from error
    if not isinstance(value, dict):
        raise NoticeError(f"{what} answered {get_excerpt(response)}, which is no JSON object.")
    return value


def parse_time(text: object, *, what: str) -> float:
    """Return an RFC 3339 time (or an RFC 1123 one, as in HTTP headers) as Unix time.

    Raises:
        NoticeError: it is neither.
    """
    if isinstance(text, str):
        for parse in (datetime.fromisoformat, email.utils.parsedate_to_datetime):
            try:
                time = parse(text.strip())
                return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
            except (ValueError, TypeError, OverflowError):
                continue
    raise NoticeError(f"{what}={text!r} is no time such as 2026-01-31T12:00:00Z or Sat, 31 Jan 2026 12:00:00 GMT.")
