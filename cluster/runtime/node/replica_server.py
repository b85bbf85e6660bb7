"""The replica server of a host's node: started without waiting for it, and again when it has ended.

What keeps it down is likely to last (no memory, no processes), so each start waits longer than the one before. What it
held is lost with it; trainers train on without snapshots, and the host answers all the while.
"""

import subprocess
import time
from collections.abc import Callable

from cluster.runtime.node.daemon import log
from elastic.checkpoint.replicas.process import ReplicaServerProcess
from elastic.transport import WireError

FIRST_WAIT_S = 10.0
"""For the first one, before the host serves anybody: the first world then has copies on other nodes."""
START_LIMIT_S = 60.0
"""One that is not ready by then is ended, and another one tried."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0


class NodeReplicaServer:
    """Has a replica server run; all of it on the thread of the host's loop.

    Args:
        launch: starts one that shall serve at a port (0: any) without waiting for it; may raise an OSError.
        on_changed: called when it has become ready, or is gone; not before `start` has returned.
    """

    def __init__(self, launch: Callable[[int], ReplicaServerProcess], *, on_changed: Callable[[], None]) -> None:
        self._launch, self._on_changed = launch, on_changed
        self.current: ReplicaServerProcess | None = None
        """The one that trainers are given a connection to; it may still start."""
        self._port = 0
        """Kept from one to the next: the trainers of other nodes, which send copies here, know no other."""
        self._started_s = self._next_s = 0.0
        self._num_failures = 0
        self._is_served = False
        """The host is up, and those whom it talks to hear of changes."""
        self._ending: list[subprocess.Popen[bytes]] = []
        """Those that were killed and have not ended."""

    def start(self) -> None:
        """Start the first one and wait for it, but not for long."""
        until_s = time.monotonic() + FIRST_WAIT_S
        self.check()
        while (
            (replica_server := self.current) is not None and not replica_server.is_ready and time.monotonic() < until_s
        ):
            self._look(replica_server, timeout_s=0.05)
        self._is_served = True

    def get_port(self) -> int | None:
        """Return where it serves other nodes; None while nothing does."""
        return self.current.port if self.current is not None and self.current.is_ready else None

    def check(self) -> None:
        """Look after it; call this often. Never waits, never raises for what a replica server does."""
        now_s = time.monotonic()
        self._ending = [process for process in self._ending if process.poll() is None]
        if self.current is not None:
            self._look(self.current, timeout_s=0.0)
        elif now_s >= self._next_s:
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        self._started_s = now_s
        try:
            self.current = self._launch(self._port)
        except OSError as error:
            self._pause(f"no replica server can be started: {error.strerror or error}")

    def _look(self, replica_server: ReplicaServerProcess, *, timeout_s: float) -> None:
        """Note that it has become ready, or has ended."""
        code = replica_server.process.poll()
        try:
            if code is None and not replica_server.is_ready:
                if replica_server.wait_ready(timeout_s):
                    self._take_ready(replica_server)
                elif time.monotonic() > self._started_s + START_LIMIT_S:
                    raise WireError(f"it was not ready within {START_LIMIT_S:g} s")
        except OSError as error:
            self._drop(replica_server, f"the replica server did not start: {error}")
            return
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._drop(replica_server, f"the replica server is gone ({how}); its snapshots with it")

    def _take_ready(self, replica_server: ReplicaServerProcess) -> None:
        took_s = time.monotonic() - self._started_s
        if self._num_failures:
            log(f"another replica server serves after {took_s:.1f} s")
        self._port = replica_server.port
        if self._is_served:
            self._on_changed()

    def _drop(self, replica_server: ReplicaServerProcess, reason: str) -> None:
        self.current = None
        replica_server.process.kill()
        self._ending.append(replica_server.process)
        replica_server.channel.close()
        if replica_server.is_ready and time.monotonic() > self._started_s + _LONGEST_PAUSE_S:
            self._num_failures = 0  # it was good for a while
        self._pause(reason)
        if self._is_served:
            self._on_changed()

    def _pause(self, reason: str) -> None:
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._num_failures)
        self._num_failures += 1
        self._next_s = time.monotonic() + pause_s
        log(f"{reason}; trainers train on without snapshots in memory, and another start is tried in {pause_s:g} s")
