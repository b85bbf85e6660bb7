"""The process of a replica server: how it starts and ends, and which connections it takes.

A trainer fills a buffer and hands it over: from then on it is listed and served, whatever else goes on. The replica
server checksums it, and sends a copy to the replica server of another node when it is told to. None of that takes the
trainer's interpreter lock or the time of its training thread. It imports no torch, so it starts at once and is small.

What was written to the node's disk on request is served like memory by the next replica server there.

It is led over the socket that is its standard input: `Adopt` brings the connection of one more trainer. It ends with
its owner (PR_SET_PDEATHSIG, and the end of that socket), and all it holds is anonymous memory that ends with it. Other
nodes' replica servers and trainers come over TCP and know the run's secret.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from elastic.checkpoint.replicas.inventory import Replica
from elastic.checkpoint.replicas.messages import FROM_ANYONE, FROM_OWNER, FROM_TRAINER, FromOwner, Ready, Start
from elastic.checkpoint.replicas.server.node_disk import NodeDisk, from_about
from elastic.checkpoint.replicas.server.store import Store
from elastic.checkpoint.replicas.server.trainer import TrainerSession, Workers
from elastic.checkpoint.replicas.server.visitor import Desk, serve
from elastic.transport import Acceptor, Channel, Peer, WireError, listen_unix

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 1.0


class ReplicaServer:
    """The state of the process; `serve` is its life."""

    def __init__(self, start: Start, owner: Channel[FromOwner]) -> None:
        self._start, self._owner = start, owner
        self._store = Store(start.node, say=_log)
        self._desk = Desk(self._store)
        self._workers = Workers(NodeDisk(Path(start.disk)) if start.disk else None)

    def serve(self, listener: socket.socket | None) -> None:
        """Adopt trainers and serve visitors that know the secret, until the owner ends."""
        if self._workers.disk is not None:
            self._find_stored(self._workers.disk)
        if listener is not None:
            _start_thread(self._accept, listener)
        if self._start.folder:
            folder = Path(self._start.folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            _start_thread(self._accept_trainers, listen_unix(folder))
        while self._owner.receive() is not None:
            self._adopt()

    def _find_stored(self, disk: NodeDisk) -> None:
        """Offer what an earlier replica server has written."""
        try:
            for stored in disk.open_all():
                info = from_about(stored.about)
                generation = info.snapshot.generation
                replica = Replica(
                    origin=stored.name,
                    index=0,
                    buffer=stored.buffer,
                    is_copy=info.is_copy,
                    is_on_disk=True,
                    generation=generation,
                )
                replica.fill(info.snapshot, num_bytes=info.num_bytes, chunks=info.chunks, record=info.record)
                replica.checksums = info.checksums
                replica.checked.set()
                self._store.add(replica)
        except (OSError, KeyError, TypeError, ValueError) as error:
            _log(f"the snapshots in {self._start.disk} cannot be read: {error!r}")

    def _accept_trainers(self, listener: socket.socket) -> None:
        """Take trainers of this node whose replica server was another one before, or none."""
        acceptor = Acceptor(listener, say=_log, secret=None)
        while True:
            for peer in acceptor.turn(_LOOK_EVERY_S):
                self._begin_trainer(peer)

    def _accept(self, listener: socket.socket) -> None:
        """Take visitors that know the secret; one thread greets them all, and nothing that a stranger does ends it."""
        acceptor = Acceptor(listener, say=_log, secret=self._start.secret, purpose="replicas")
        while True:
            for peer in acceptor.turn(_LOOK_EVERY_S):
                try:
                    _start_thread(serve, Channel(peer, FROM_ANYONE), self._desk, _log)
                except RuntimeError as error:  # no more threads
                    _log(f"a connection was ended: {error}")
                    peer.socket.close()

    def _adopt(self) -> None:
        """Serve one more trainer, if that can be: one that cannot be served trains on without snapshots."""
        try:
            connection = socket.socket(fileno=self._owner.take_descriptor())
        except OSError as error:  # the kernel drops a descriptor that a process has no room for
            _log(f"a trainer gets no snapshots: {error}")
            return
        self._begin_trainer(Peer(connection, None))

    def _begin_trainer(self, peer: Peer) -> None:
        session = TrainerSession(
            Channel(peer, FROM_TRAINER),
            store=self._store,
            desk=self._desk,
            workers=self._workers,
            secret=self._start.secret,
            say=_log,
        )
        try:
            _start_thread(session.serve)
        except RuntimeError as error:  # no more threads
            _log(f"a trainer gets no snapshots: {error}")
            peer.socket.close()


def _start_thread(target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk ends no replica server
        print(f"replica server: {text}", file=sys.stderr, flush=True)  # noqa: T201 (the log of the process that started it)


def _listen(ip: str, port: int) -> socket.socket:
    try:
        return socket.create_server((ip, port))
    except OSError:  # another process has the port by now
        return socket.create_server((ip, 0))


def main() -> NoReturn:
    """Become the replica server that the first message on standard input describes."""
    owner = Channel(Peer(socket.socket(fileno=os.dup(0)), None), FROM_OWNER)
    start = owner.receive()
    assert isinstance(start, Start), f"a replica server is started with Start, not {start}"
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != start.owner_pid:
        os._exit(1)
    listener = _listen(start.ip, start.port) if start.ip else None
    try:
        owner.send(Ready(port=listener.getsockname()[1] if listener else 0))
        ReplicaServer(start, owner).serve(listener)
    except WireError as error:
        _log(f"the process that started it is gone: {error}")
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # threads may be in the middle of a write that is not waited for


if __name__ == "__main__":
    main()
