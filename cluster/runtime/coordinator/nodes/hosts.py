"""The coordinator's hosts, one per node: who is there, and who has gone, with a FIN or without."""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster import controller
from cluster.runtime.coordinator.nodes.node_records import Host, HostLink, Nodes
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import (
    FROM_HOST,
    Beat,
    CoordinatorMessage,
    End,
    HostHello,
    HostMessage,
    Renew,
    ReplicaServerMoved,
    TrainerSaid,
    Welcome,
)
from cluster.types import Claimed, Expired, Slot, TrainerDying, TrainerEnded, Unkillable
from elastic.transport import Acceptor, Link

HOST_SILENT_S = 4.0
"""A host that has not sent its beat (once a second) for this long is taken for gone: a lost machine sends no FIN."""
News = Claimed | Expired | TrainerDying | TrainerEnded | Unkillable | TrainerSaid
"""What a host says of trainers and claims."""
_LAST_WORD_S = 1.0
"""For so long a host that takes nothing keeps the others' coordinator from its end."""
_Link = Link[HostHello | HostMessage]


class Hosts:
    """Serves them on a port of its own. One thread does all of it; any may call `wake`.

    Args:
        nodes: the records that say who is there.
        ip: of this node, where it listens.
        port: where hosts look for us, unless it is taken; 0: any.
        secret: what a host must know.
        on_ready: takes the node of a host that has come.
        on_message: takes what a host says of its own trainers and claims.
        on_gone: takes the node of a host that is gone, and why.
        say: takes a line about others who tried to come, now and then.
    """

    def __init__(
        self,
        ip: str,
        nodes: Nodes,
        *,
        port: int = 0,
        secret: str,
        on_ready: Callable[[str], None],
        on_message: Callable[[News], None],
        on_gone: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._on_ready, self._on_message, self._on_gone = on_ready, on_message, on_gone
        self._nodes, self._say = nodes, say
        listener = _listen(ip, port)
        self.port: int = listener.getsockname()[1]
        self._acceptor = Acceptor(listener, say=say, secret=secret, purpose="coordinator")
        self._loop = EventLoop()
        self._loop.watch(self._acceptor, self._accept)
        self._wake_out, wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._loop.watch(wake_in, lambda: wake_in.recv(4096))

    def serve(self, *, timeout_s: float) -> None:
        """Take what has come, or comes within this time, and let go of whoever has been silent for too long."""
        asked_s = time.monotonic()
        self._loop.turn(timeout_s)
        self._accept()  # and let go of who has not said anything
        for node in self._nodes.by_id.values():
            # what had arrived when we asked was heard: our own time on a slow storage is not the host's silence
            if node.host and asked_s - node.host.connection.heard_s > HOST_SILENT_S:
                self._drop(node.id, node.host.connection, f"its host has been silent for {HOST_SILENT_S:g} s")

    def wake(self) -> None:
        """Have `serve` return."""
        with contextlib.suppress(BlockingIOError):  # it has been told often enough
            self._wake_out.send(b"x")

    def tell(self, node: str, message: CoordinatorMessage) -> None:
        """Tell the host of a node, if it is there; never wait for it."""
        if host := self._nodes.get(node).host:
            host.connection.link.send(message)

    def renew_leases(self) -> None:
        """Have the hosts keep what Ray Train may yet send an agent for, and themselves while they have no slots."""
        hosts = {node.id: node.host for node in self._nodes.by_id.values() if node.host}
        held = {Slot(node, name): held for node, host in hosts.items() for name, held in host.holders.items()}
        surplus = controller.find_surplus(held)
        for node, host in hosts.items():
            kept = tuple(name for name in host.holders if not surplus or Slot(node, name) not in surplus)
            host.connection.link.send(Renew(slots=kept))

    def end_all(self, reason: str, *, forget: bool) -> None:
        """End all hosts.

        Args:
            forget: nobody will go on from what lies on the disks of their nodes.
        """
        links = [node.host.connection.link for node in self._nodes.by_id.values() if node.host]
        for link in links:
            link.send(End(reason=reason, forget=forget))
        until_s = time.monotonic() + _LAST_WORD_S
        while time.monotonic() < until_s and any(link.has_backlog for link in links):
            for link in links:
                link.flush()
            time.sleep(0.01)

    def _accept(self) -> None:
        for peer in self._acceptor.turn():
            link = Link(peer, FROM_HOST, sends="at once")
            self._loop.watch(link, lambda link=link: self._greet(link))

    def _greet(self, link: _Link) -> None:
        """Take the first message of a connection."""
        messages = link.receive()
        if messages == []:
            return
        if messages is None or not isinstance(hello := messages[0], HostHello):
            self._loop.unwatch(link)
            self._say(f"a connection of this run was refused: {link.fault or 'it came as no host'}")
            return
        if previous := self._nodes.get(hello.node).host:
            self._drop(hello.node, previous.connection, "a new host took its place")
        connection = HostLink(link=link, heard_s=time.monotonic())
        host = Host(pid=hello.pid, connection=connection, replica_server=hello.replica_server)
        self._nodes.put(replace(self._nodes.get(hello.node), host=host, lost_s=None))
        self._loop.watch(link, lambda: self._hear(hello.node, connection))
        link.send(Welcome())
        self._on_ready(hello.node)
        self._hear_all(hello.node, connection, messages[1:])

    def _hear(self, node: str, connection: HostLink) -> None:
        link = connection.link
        messages = link.receive()
        if messages is None:
            self._drop(node, connection, f"its connection broke: {link.fault}" if link.fault else "the node went away")
            return
        connection.heard_s = time.monotonic()
        self._hear_all(node, connection, messages)

    def _hear_all(self, node: str, connection: HostLink, messages: Sequence[HostHello | HostMessage]) -> None:
        for message in messages:
            match message:
                case ReplicaServerMoved(address=address):
                    how = "is gone: no snapshots in memory until another one serves" if address is None else "serves"
                    self._say(f"node {node[:8]}: its replica server {how}")
                    self._change_host(node, lambda host, address=address: replace(host, replica_server=address))
                case Beat(holders=holders):
                    self._change_host(node, lambda host, holders=holders: replace(host, holders=holders))
                case HostHello():  # it has said so
                    pass
                case _ if message.slot.node != node:
                    self._drop(node, connection, f"its host spoke for node {message.slot.node[:8]!r}")
                    return
                case _:
                    self._on_message(message)

    def _change_host(self, node: str, change: Callable[[Host], Host]) -> None:
        """Note what a host says of itself; most beats say nothing new."""
        record = self._nodes.get(node)
        if record.host and (changed := change(record.host)) != record.host:
            self._nodes.put(replace(record, host=changed))

    def _drop(self, node: str, connection: HostLink, reason: str) -> None:
        self._loop.unwatch(connection.link)
        record = self._nodes.get(node)
        if record.host and record.host.connection is connection:
            self._nodes.put(replace(record, host=None, lost_s=time.monotonic()))
            self._on_gone(node, reason)


def _listen(ip: str, port: int) -> socket.socket:
    try:
        return socket.create_server((ip, port))
    except OSError as error:
        if not port or error.errno != errno.EADDRINUSE:
            raise
        return socket.create_server((ip, 0))
