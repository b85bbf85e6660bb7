"""Hold one machine's Ray node: start `ray start`, keep it running, and end it cleanly within the machine's notice.

The node watch, an actor that the run's coordinator puts on every node, reads the notices; here a SIGTERM is handed to
`ray start`, whose own drain is set to what the machine grants. The watch is taken away once the run needs nothing here.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.processes import find_running, list_processes

_LOOK_S = 0.5
_FIRST_BACKOFF_S = 1.0
_MOST_BACKOFF_S = 30.0
_HEALTHY_S = 60.0
_WITHDRAWN_S = 30.0
"""A machine that still lives so long after the end it announced is there to stay."""
_LET_GO_S = 1.5
"""A watch that is gone for so long was taken away, and not started anew."""
_KILL_S = 1.0
"""What the end of the processes themselves takes."""
_DRAINED = re.compile(rb"Drain raylet RPC has received\. Deadline is (\d+)\.")
"""In the raylet's log; tests/ray/test_submit.py holds Ray 2.60 to it."""


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """What to start, and for how long it may take its leave."""

    command: Sequence[str]
    env: Mapping[str, str]
    head: tuple[str, int] | None
    """Where it joins; None for the head itself."""
    grace_s: float


def hold(plan: NodePlan, *, say: Callable[[str], None]) -> int:
    """Keep the node in its cluster until SIGTERM or Ctrl-C; return 0 if it left in time.

    A node that ends by itself is started again: its head was lost, or it drained and the machine is still there.
    """
    told = _Signals()
    backoff_s = _FIRST_BACKOFF_S
    while not told.leave.is_set():
        if not _wait_for_head(plan, told, say):
            break
        start_s = time.monotonic()
        process = subprocess.Popen(plan.command, env=dict(plan.env), stdin=subprocess.DEVNULL)
        node = _Node(process)
        while node.is_alive() and not told.leave.wait(_LOOK_S):
            pass
        if told.leave.is_set():
            return _leave(node, plan, told, say)
        code = process.poll()
        node.kill()
        pause_s = backoff_s
        if deadline_s := node.find_drain_deadline():
            pause_s = max(0.0, deadline_s - time.time()) + _WITHDRAWN_S
            say(f"this node was drained; if the machine is still here in {pause_s:.0f} s, it joins again")
        else:
            why = "its daemon ended" if code is None else f"exit code {code}"
            say(f"Ray ended here ({why}; its logs say more); starting it again in {pause_s:.0f} s")
        lived_s = time.monotonic() - start_s
        backoff_s = _FIRST_BACKOFF_S if lived_s > _HEALTHY_S else min(2 * backoff_s, _MOST_BACKOFF_S)
        told.leave.wait(pause_s)
    return 0


class _Signals:
    """SIGTERM or Ctrl-C: leave; a second one: at once."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.at_once = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, *_: object) -> None:
        (self.at_once if self.leave.is_set() else self.leave).set()


class _Node:
    """The processes of one `ray start --block`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._raylet = 0
        self._log: Path | None = None

    def is_alive(self) -> bool:
        """Whether command and raylet run; the command outlives a raylet that has drained."""
        if self.process.poll() is not None:
            return False
        if not self._raylet:
            children = (process for process in list_processes() if process.parent == self.process.pid)
            self._raylet = next((process.pid for process in children if process.name == "raylet"), 0)
            if self._raylet:
                with contextlib.suppress(OSError):  # it has just ended
                    self._log = Path(f"/proc/{self._raylet}/fd/1").readlink()
            return True
        return self._has_raylet()

    def is_watched(self) -> bool:
        """Whether a run's watch is here: its coordinator takes it away once the run needs nothing of this node."""
        return any(command.startswith(b"ray::WatchActor") for command in _find_commands(self._raylet))

    def end_raylet(self) -> None:
        """Take the node out of its cluster at once; the command ends with it."""
        if self._raylet and self._has_raylet():
            os.kill(self._raylet, signal.SIGTERM)

    def find_drain_deadline(self) -> float | None:
        """Return the Unix time at which Ray was told that this node would be gone."""
        try:
            found = _DRAINED.findall(self._log.read_bytes()) if self._log else []
        except OSError:
            return None
        return int(found[-1]) / 1000 if found else None

    def kill(self) -> None:
        """End all that is left: they are one process group, made by Ray."""
        if self.process.poll() is None and os.getpgid(self.process.pid) == self.process.pid:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _has_raylet(self) -> bool:
        raylet = find_running(self._raylet)
        return raylet is not None and raylet.name == "raylet"


def _leave(node: _Node, plan: NodePlan, told: _Signals, say: Callable[[str], None]) -> int:
    deadline_s = time.monotonic() + plan.grace_s - _KILL_S
    say(f"leaving: this node drains, and is gone in {plan.grace_s:g} s at the latest (a second signal: at once)")
    was_watched = node.is_watched()
    node.process.send_signal(signal.SIGTERM)
    gone_s = time.monotonic()
    while node.process.poll() is None and time.monotonic() < deadline_s and not told.at_once.wait(_LOOK_S):
        if node.is_watched():
            gone_s = time.monotonic()
        elif was_watched and time.monotonic() - gone_s > _LET_GO_S:
            node.end_raylet()  # it would wait for Ray Train's worker, which stays where it is
    in_time = node.process.poll() is not None
    node.kill()
    say("left" if in_time else "left at the deadline, before all that ran here had moved on")
    return 0 if in_time else 1


def _wait_for_head(plan: NodePlan, told: _Signals, say: Callable[[str], None]) -> bool:
    """Return once the head takes connections; False if this node is to leave before."""
    is_said = False
    while plan.head and not told.leave.is_set():
        try:
            socket.create_connection(plan.head, timeout=5.0).close()
            return True
        except OSError as error:
            if not is_said:
                say(f"the head at {plan.head[0]}:{plan.head[1]} does not answer ({error}); trying again until it does")
                is_said = True
            told.leave.wait(2.0)
    return not told.leave.is_set()


def _find_commands(parent: int) -> list[bytes]:
    """Return the command lines of a process's children."""
    found: list[bytes] = []
    for process in list_processes():
        if process.parent == parent:
            with contextlib.suppress(OSError):  # it has just ended
                found.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    return found
