"""The coordinator's hosts, one per node: who is there, who has gone, with a FIN or without, and who must be started."""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from cluster import controller
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import (
    FROM_HOST,
    Beat,
    CoordinatorMessage,
    End,
    HostHello,
    HostMessage,
    KeeperMoved,
    Renew,
    SlotClaimed,
    SlotExpired,
    TrainerLeft,
    TrainerSaid,
    TrainerStuck,
    Welcome,
)
from cluster.types import Slot
from elastic.ports import Address
from elastic.transport import Acceptor, Link

HOST_SILENT_S = 4.0
"""A host that has not sent its beat (once a second) for this long is taken for gone: a lost machine sends no FIN."""
News = SlotClaimed | SlotExpired | TrainerLeft | TrainerStuck | TrainerSaid
"""What a host says of trainers and claims."""
_LAST_WORD_S = 1.0
"""For so long a host that takes nothing keeps the others' coordinator from its end."""
_Link = Link[HostHello | HostMessage]
LOST_FOR_S = 30.0
"""For so long after the end of its host a node takes no new agents, unless another host shows that it lives."""


@dataclass(kw_only=True)
class _Host:
    node: str
    pid: int
    link: _Link
    keeper: Address | None
    """Where the memory of the node is served."""
    heard_s: float
    """On the monotonic clock, as the clock may be set."""
    holders: dict[Slot, controller.Holder | None] = field(default_factory=dict[Slot, controller.Holder | None])
    """Whose agents hold its slots, as it said last."""


class Hosts:
    """Serves them on a port of its own. One thread calls `serve` and is called back from it; any may do the rest.

    Args:
        ip: of this node, where it listens.
        port: where hosts look for us, unless it is taken; 0: any.
        secret: what a host must know.
        on_ready: takes the node of a host that has come.
        on_message: takes a node and what its host says of trainers and claims.
        on_gone: takes the node of a host that is gone, and why.
        say: takes a line about others who tried to come, now and then.
    """

    def __init__(
        self,
        ip: str,
        *,
        port: int = 0,
        secret: str,
        on_ready: Callable[[str], None],
        on_message: Callable[[str, News], None],
        on_gone: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._on_ready, self._on_message, self._on_gone = on_ready, on_message, on_gone
        self._say = say
        listener = _listen(ip, port)
        self.port: int = listener.getsockname()[1]
        self._acceptor = Acceptor(listener, say=say, secret=secret, purpose="coordinator")
        self._loop = EventLoop()
        self._loop.watch(self._acceptor, self._accept)
        self._wake_out, wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._loop.watch(wake_in, lambda: wake_in.recv(4096))
        self._hosts: dict[str, _Host] = {}
        self._lost_s: dict[str, float] = {}
        """When the last host of a node went, on the monotonic clock; none has come since."""

    def serve(self, *, timeout_s: float) -> None:
        """Take what has come, or comes within this time, and let go of whoever has been silent for too long."""
        asked_s = time.monotonic()
        self._loop.turn(timeout_s)
        self._accept()  # and let go of who has not said anything
        for host in list(self._hosts.values()):
            # what had arrived when we asked was heard: our own time on a slow storage is not the host's silence
            if asked_s - host.heard_s > HOST_SILENT_S:
                self._drop(host, f"its host has been silent for {HOST_SILENT_S:g} s")

    def wake(self) -> None:
        """Have `serve` return."""
        with contextlib.suppress(BlockingIOError):  # it has been told often enough
            self._wake_out.send(b"x")

    def tell(self, node: str, message: CoordinatorMessage) -> None:
        """Tell the host of a node, if it is there; never wait for it."""
        if host := self._hosts.get(node):
            host.link.send(message)

    def renew_leases(self) -> None:
        """Have the hosts keep what Ray Train may yet send an agent for, and themselves while they have no slots."""
        hosts = list(self._hosts.values())
        surplus = controller.find_surplus({slot: held for host in hosts for slot, held in host.holders.items()})
        for host in hosts:
            host.link.send(Renew(slots=tuple(slot.name for slot in host.holders if slot not in surplus)))

    def end_all(self, reason: str, *, forget: bool) -> None:
        """End all hosts.

        Args:
            forget: nobody will go on from what lies on the disks of their nodes.
        """
        for host in list(self._hosts.values()):
            host.link.send(End(reason=reason, forget=forget))
        until_s = time.monotonic() + _LAST_WORD_S
        while time.monotonic() < until_s and any(host.link.has_backlog for host in list(self._hosts.values())):
            for host in list(self._hosts.values()):
                host.link.flush()
            time.sleep(0.01)

    def get_pids(self) -> dict[str, int]:
        """Return the processes of the hosts, by node."""
        return {host.node: host.pid for host in list(self._hosts.values())}

    def get_keepers(self) -> dict[str, Address]:
        """Return where the memories of the nodes are served."""
        return {host.node: host.keeper for host in list(self._hosts.values()) if host.keeper}

    def get_lost(self) -> frozenset[str]:
        """Return the nodes whose host has just gone."""
        now_s = time.monotonic()
        return frozenset(node for node, lost_s in list(self._lost_s.items()) if now_s - lost_s < LOST_FOR_S)

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
        host = _Host(node=hello.node, pid=hello.pid, link=link, keeper=hello.keeper, heard_s=time.monotonic())
        if previous := self._hosts.get(host.node):
            self._drop(previous, "a new host took its place")
        self._hosts[host.node] = host
        self._lost_s.pop(host.node, None)
        self._loop.watch(link, lambda: self._hear(host))
        link.send(Welcome())
        self._on_ready(host.node)
        self._hear_all(host, messages[1:])

    def _hear(self, host: _Host) -> None:
        messages = host.link.receive()
        if messages is None:
            self._drop(host, f"its connection broke: {host.link.fault}" if host.link.fault else "the node went away")
            return
        host.heard_s = time.monotonic()
        self._hear_all(host, messages)

    def _hear_all(self, host: _Host, messages: Sequence[HostHello | HostMessage]) -> None:
        for message in messages:
            match message:
                case KeeperMoved(address=address):
                    how = "is gone: no snapshots in memory until another one serves" if address is None else "serves"
                    self._say(f"node {host.node[:8]}: the keeper of its snapshots {how}")
                    host.keeper = address
                case Beat(holders=holders):
                    host.holders = {Slot(host.node, name): holder for name, holder in holders.items()}
                case HostHello():  # it has said so
                    pass
                case _:
                    self._on_message(host.node, message)

    def _drop(self, host: _Host, reason: str) -> None:
        self._loop.unwatch(host.link)
        if self._hosts.get(host.node) is host:
            del self._hosts[host.node]
            self._lost_s[host.node] = time.monotonic()
            self._on_gone(host.node, reason)


class Start(Protocol):
    """The start of one host, under way or over."""

    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        ...

    def get_failure(self) -> str:
        """Return what it has failed of; empty if it has not, or goes on."""
        ...


class HostStarts:
    """Has a host started on each node that lacks one, and again where none has come of that.

    A start that goes on is waited for. Each takes a process of Ray's, which imports for seconds: on a slow machine one
    more would make all of them slower, until there is time for nothing else.

    Args:
        start: starts a host on a node, without waiting for it.
        every_s: not sooner than so long after the start before.
        say: takes a line for people about a start that failed.
    """

    def __init__(self, start: Callable[[str], Start], *, every_s: float, say: Callable[[str], None]) -> None:
        self._start, self._every_s, self._say = start, every_s, say
        self._starts: dict[str, tuple[float, Start]] = {}

    def follow(self, nodes: Set[str], with_host: Set[str], *, now_s: float) -> None:
        """Start what is due.

        Args:
            nodes: all that live.
            with_host: those of them whose host is there.
        """
        for node in self._starts.keys() - nodes:
            del self._starts[node]
        for node in nodes - with_host:
            since_s, start = self._starts.get(node, (0.0, None))
            if start is None or (start.is_over() and now_s - since_s > self._every_s):
                if start is not None and (failure := start.get_failure()):
                    self._say(f"node {node[:8]}: {failure}; it is tried again")
                self._starts[node] = (now_s, self._start(node))


def _listen(ip: str, port: int) -> socket.socket:
    try:
        return socket.create_server((ip, port))
    except OSError as error:
        if not port or error.errno != errno.EADDRINUSE:
            raise
        return socket.create_server((ip, 0))
