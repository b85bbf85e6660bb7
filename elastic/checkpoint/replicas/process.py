"""How a replica server is started, and led by the process that has started it. No torch here."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from elastic.checkpoint.replicas.messages import TO_OWNER, Adopt, Ready, Start
from elastic.transport import Channel, Peer, WireError

_READY_TIMEOUT_S = 30.0
"""A busy machine takes seconds to start Python."""


@dataclass(kw_only=True)
class ReplicaServerProcess:
    """A replica server that this process started; it ends when this process does or `close` is called."""

    process: subprocess.Popen[bytes]
    channel: Channel[Ready]
    port: int = 0
    """Where other nodes reach it, at the address it was given, once it is ready; 0: nowhere."""
    is_ready: bool = False

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until it serves; False if it does not in time. Trainers may connect before.

        Raises:
            WireError: it has ended, or said something else.
        """
        if not self.is_ready and self.channel.can_receive(timeout_s):
            self.channel.set_timeout(_READY_TIMEOUT_S)
            ready = self.channel.receive()
            self.channel.set_timeout(None)
            if ready is None:
                raise WireError("the replica server ended while it started; its log says why")
            self.port, self.is_ready = ready.port, True
        return self.is_ready

    def open_connection(self) -> socket.socket:
        """Return one trainer's connection to the replica server; a fork may take it along.

        Raises:
            WireError: the replica server is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self.channel.send(Adopt(), descriptor=theirs.fileno())
        return ours

    def close(self) -> None:
        """End the replica server and free what it holds."""
        self.channel.close()
        self.process.wait()


def start_replica_server(*, node: str, ip: str, secret: str, disk: str = "") -> ReplicaServerProcess:
    """Start a replica server and wait until it serves; see `launch_replica_server`.

    Raises:
        WireError: it did not start.
        OSError: the kernel has no process or no descriptor for it.
    """
    server = launch_replica_server(node=node, ip=ip, secret=secret, disk=disk)
    if not server.wait_ready(_READY_TIMEOUT_S):
        server.process.kill()
        server.close()
        raise WireError(f"the replica server was not ready within {_READY_TIMEOUT_S:g} s")
    return server


def launch_replica_server(
    *, node: str, ip: str, secret: str, disk: str = "", port: int = 0, folder: str = ""
) -> ReplicaServerProcess:
    """Start a replica server that ends with this process; call it on the main thread, whose end would end the replica
    server.

    Args:
        ip: where other nodes reach it; empty: nowhere.
        disk: the run's folder on a disk of the node's own; empty: there is none.
        port: where they look for it, unless that is taken; 0: any.
        folder: where this node's trainers can connect to it by themselves, and to the next one; empty: nowhere.

    Raises:
        OSError: the kernel has no process or no descriptor for it.
    """
    ours, theirs = socket.socketpair()
    channel = Channel(Peer(ours, None), TO_OWNER)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "elastic.checkpoint.replicas.server"],
                stdin=theirs.fileno(),
                env=env,
                start_new_session=True,  # a Ctrl-C in the terminal is for the trainers, which then save
            )
    except OSError:
        channel.close()
        raise
    server = ReplicaServerProcess(process=process, channel=channel)
    start = Start(node=node, owner_pid=os.getpid(), ip=ip, secret=secret, disk=disk, port=port, folder=folder)
    with contextlib.suppress(WireError):  # it has just ended, which `wait_ready` says
        channel.send(start)
    return server
