"""A trainer that the host has forked: what its parent knows of it, and what the child does first. No torch here."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from cluster.runtime.messages import (
    FROM_TRAINER,
    MAX_TRAINER_BYTES,
    TO_TRAINER,
    Alive,
    Order,
    TrainerMessage,
    Warm,
    WorldLeft,
)
from cluster.runtime.node.daemon import write_to
from elastic.checkpoint.replicas.process import ReplicaServerProcess
from elastic.transport import Link, Peer, WireError

_PR_SET_PDEATHSIG = 1

TrainerLink = Link[Warm | Alive | WorldLeft | TrainerMessage]
"""The host's end."""
OrderLink = Link[Order]
"""The trainer's end."""


@dataclass(kw_only=True)
class Trainer:
    """A forked trainer, as its parent sees it."""

    pid: int
    pidfd: int
    link: TrainerLink
    attempt: int | None = None
    """Whose world it is in; None: it waits for one."""
    is_warm: bool = False
    """It has opened its device, knows its part and could join a world."""
    heard_s: float | None = None
    step: int = 0
    """The last one it told."""
    num_steps: int = 0
    """Those of its world that it told."""
    is_talking: bool = True
    """Its end of the link is open; what it sent may still lie there after its death."""
    leave_until_s: float | None = None
    """It was asked to leave a world that the coordinator does not know, and is killed if it has not by then."""
    said: WorldLeft | None = None
    """Its last word about how it ended, if it ends with its world."""
    killed: bool = False
    """The coordinator, or who follows it, wants its end."""
    killed_s: float | None = None
    """When it was killed first, on the monotonic clock."""
    is_dying: bool = False
    """The coordinator was told that the kernel takes it down."""
    stuck_in: list[int] = field(default_factory=list[int])
    """The attempts that the coordinator was told cannot have a trainer in its slot, because this does not end."""

    def kill(self, *, is_wanted: bool = True) -> None:
        """End it; its parent hears of that, and must not wait: the kernel lets go of some processes late or never."""
        self.killed = self.killed or is_wanted
        self.killed_s = time.monotonic() if self.killed_s is None else self.killed_s
        os.kill(self.pid, signal.SIGKILL)

    def take_exit_code(self) -> int | None:
        """Return its exit code (-N: signal N) and let the kernel forget it; None while it has not ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def fork_trainer(
    run: Callable[[OrderLink, socket.socket | None], None],
    *,
    replica_server: ReplicaServerProcess | None,
    env: Mapping[str, str],
    log: Path,
    inherited: Iterable[int],
) -> Trainer:
    """Fork a trainer from this process, which is warm and has one thread.

    Args:
        run: its life, with its end of the link to its parent and its connection to the replica server.
        env: what its agent was given, such as the devices.
        inherited: descriptors that are none of the child's business.

    Raises:
        OSError: the kernel has no process, memory or descriptor for it.
    """
    ours, theirs = socket.socketpair()
    memory: socket.socket | None = None
    with contextlib.suppress(WireError):  # it has just ended; another one may be there for the next trainer
        memory = replica_server.open_connection() if replica_server else None
    parent_pid = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        for each in filter(None, (ours, theirs, memory)):
            each.close()
        raise
    if pid == 0:
        ours.close()
        for descriptor in inherited:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if replica_server:
            replica_server.channel.forget()
        orders = Link(Peer(theirs, None), TO_TRAINER, sends="waiting", limit_bytes=MAX_TRAINER_BYTES)
        _live(lambda: run(orders, memory), env=env, log=log, parent_pid=parent_pid)
    theirs.close()
    if memory:
        memory.close()
    link = Link(Peer(ours, None), FROM_TRAINER, sends="at once", limit_bytes=MAX_TRAINER_BYTES)
    return Trainer(pid=pid, pidfd=os.pidfd_open(pid), link=link)


def _live(run: Callable[[], None], *, env: Mapping[str, str], log: Path, parent_pid: int) -> NoReturn:
    """Be a process of its own that dies with its parent."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
        write_to(log)
        os.environ.update(env)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
