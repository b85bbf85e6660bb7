"""The agent: what Ray Train starts, counts and restarts. It claims a slot of its node's host and relays; no torch.

Two traps of Ray Train shape it. A worker that raises makes Ray restart the whole group, so nothing here may raise.
A worker that returns counts as finished, so it stays until the run is over, even with nothing left to do, and while the
coordinator is being replaced by another one.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cluster.runtime.messages import Bye, Claim, ClaimGranted, Exited, Fenced
from cluster.runtime.node.connect import HostLink, connect
from cluster.runtime.node.start_host import get_host_folder, start_host
from cluster.runtime.ray import adapter
from elastic.errors import SolventError

RETRY_S = 0.2
_FAILED_START_S = 10.0
MOST_LINES = 200
"""Of a trainer that floods its log, the driver sees this many lines at a time; the log on the node has all."""


def run_agent(fields: dict[str, Any]) -> None:
    """Claim and hold a slot until the run is over.

    Args:
        fields: `coordinator_name`, the named actor that leads this run.
    """
    name, log = fields["coordinator_name"], _LogTail()
    group: int | None = None
    while True:
        try:
            coordinator = adapter.get_coordinator(name)
            if coordinator is not None:
                if adapter.call(coordinator.is_over):
                    return
                place = adapter.get_worker_place()
                if group is None:  # once and for all: to a later coordinator this group would be a new one
                    group = int(adapter.call(coordinator.enter_group, place.group_key))
                relay = partial(_relay, name)
                if link := _connect(place.node, coordinator, relay):
                    _serve_once(link, place, group, log, relay)
        except adapter.ActorGoneError:  # the driver sees to that
            pass
        except Exception:
            traceback.print_exc()
        time.sleep(RETRY_S)


def _serve_once(
    link: HostLink, place: adapter.WorkerPlace, group: int, log: "_LogTail", relay: Callable[[list[str]], None]
) -> None:
    """Claim a slot of the node's host and relay until the host is gone or the slot is taken by a newer agent."""
    link.send(
        Claim(
            group=group,
            group_size=place.group_size,
            pid=os.getpid(),
            slot=f"gpu{place.gpus}" if place.gpus else "",
            env={"CUDA_VISIBLE_DEVICES": place.gpus},
        )
    )
    while True:
        messages = link.receive(timeout_s=RETRY_S)
        lines = [line for message in messages or [] for line in _take(message, log)] + log.read_new()
        if lines:
            sys.stdout.write("\n".join([*lines, ""]))  # into Ray's log of this worker
            sys.stdout.flush()
            relay([f"{place.node[:8]} {line}" for line in lines])
        if messages is None or any(isinstance(message, (Fenced, Bye)) for message in messages):
            link.close()
            return


def _relay(coordinator_name: str, lines: list[str]) -> None:
    """Have the driver show lines, if there is a coordinator to take them now."""
    if (coordinator := adapter.get_coordinator(coordinator_name)) is not None:
        adapter.post(coordinator.relay, lines)


def _connect(node: str, coordinator: Any, relay: Callable[[list[str]], None]) -> HostLink | None:
    """Connect to the node's host, started now if there is none; None if it cannot start, of which the driver is told.

    Raises:
        ActorGoneError: nobody knows any more where the host would have to report.
    """
    host_fields = adapter.call(coordinator.get_host_fields)
    folder = get_host_folder(node, host_fields["session"])
    if link := connect(folder):
        return link
    try:
        start_host(node, host_fields)
    except SolventError as error:
        relay([f"{node[:8]} {error}"])
        time.sleep(_FAILED_START_S)
    return connect(folder)


def _take(message: ClaimGranted | Exited | Fenced | Bye, log: "_LogTail") -> list[str]:
    """Act on a message of the host; return what is worth telling."""
    match message:
        case ClaimGranted():
            log.follow(Path(message.log), message.slot)
            return []
        case Exited():
            end = f"trainer {message.pid} of attempt {message.attempt} ended with {message.code}"
            return [*log.read_new(), end] if message.code else log.read_new()
        case Fenced():
            return [f"a newer agent (group {message.by}) took this slot"]
        case Bye():
            return f"the host of this node ended: {message.reason}".splitlines()


class _LogTail:
    """Reads what trainers append to their log."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._position = 0
        self._label = ""

    def follow(self, path: Path, label: str) -> None:
        """Follow this log from its end on."""
        if path != self._path:
            self._path, self._label = path, label
            self._position = path.stat().st_size if path.exists() else 0

    def read_new(self) -> list[str]:
        """Return the whole lines that are new, but only the last of very many."""
        if self._path is None or not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._position += end
        return [f"{self._label}: {line}" for line in data[:end].decode(errors="replace").splitlines()[-MOST_LINES:]]
