"""The coordinator's hosts, one per node: who is there, who has gone, with a FIN or without, and who must be started."""

import errno
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster import controller
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.link import Link, Message
from cluster.types import Slot
from elastic.ports import Address

HOST_SILENT_S = 4.0
"""A host that has not sent its beat (once a second) for this long is taken for gone: a lost machine sends no FIN."""
LOST_FOR_S = 30.0
"""For so long after the end of its host a node takes no new agents, unless another host shows that it lives."""


@dataclass(kw_only=True)
class _Host:
    node: str
    pid: int
    link: Link
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
    """

    def __init__(
        self,
        ip: str,
        *,
        port: int = 0,
        secret: str,
        on_ready: Callable[[str], None],
        on_message: Callable[[str, Message], None],
        on_gone: Callable[[str, str], None],
    ) -> None:
        self._secret = secret
        self._on_ready, self._on_message, self._on_gone = on_ready, on_message, on_gone
        self._listener = _listen(ip, port)
        self.port: int = self._listener.getsockname()[1]
        self._loop = EventLoop()
        self._loop.watch(self._listener, self._accept)
        self._wake_out, wake_in = socket.socketpair()
        self._loop.watch(wake_in, lambda: wake_in.recv(4096))
        self._hosts: dict[str, _Host] = {}
        self._lost_s: dict[str, float] = {}
        """When the last host of a node went, on the monotonic clock; none has come since."""

    def serve(self, *, timeout_s: float) -> None:
        """Take what has come, or comes within this time, and let go of whoever has been silent for too long."""
        asked_s = time.monotonic()
        self._loop.turn(timeout_s)
        for host in list(self._hosts.values()):
            # what had arrived when we asked was heard: our own time on a slow storage is not the host's silence
            if asked_s - host.heard_s > HOST_SILENT_S:
                self._drop(host, f"its host has been silent for {HOST_SILENT_S:g} s")

    def wake(self) -> None:
        """Have `serve` return."""
        self._wake_out.send(b"x")

    def tell(self, slot: Slot, kind: str, **fields: Any) -> None:
        """Tell the host of a slot, if it is there."""
        if host := self._hosts.get(slot.node):
            host.link.send(kind, slot=slot.name, **fields)

    def renew_leases(self) -> None:
        """Have the hosts keep what Ray Train may yet send an agent for, and themselves while they have no slots."""
        hosts = list(self._hosts.values())
        surplus = controller.find_surplus({slot: held for host in hosts for slot, held in host.holders.items()})
        for host in hosts:
            host.link.send("renew", slots=[slot.name for slot in host.holders if slot not in surplus])

    def end_all(self, reason: str, *, forget: bool) -> None:
        """End all hosts.

        Args:
            forget: nobody will go on from what lies on the disks of their nodes.
        """
        for host in list(self._hosts.values()):
            host.link.send("end", reason=reason, forget=forget)

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
        connection, _ = self._listener.accept()
        connection.settimeout(10)
        link = Link(connection)
        self._loop.watch(link, lambda: self._greet(link))

    def _greet(self, link: Link) -> None:
        """Take the first message of a connection: a host that knows the secret, or nobody."""
        messages = link.receive()
        if messages == []:
            return
        hello = messages[0] if messages else {}
        if hello.get("kind") != "host" or not secrets.compare_digest(str(hello.get("secret")), self._secret):
            self._loop.unwatch(link)
            return
        host = _Host(
            node=hello["node"],
            pid=hello["pid"],
            link=link,
            keeper=_to_address(hello["keeper"]),
            heard_s=time.monotonic(),
        )
        if previous := self._hosts.get(host.node):
            self._drop(previous, "a new host took its place")
        self._hosts[host.node] = host
        self._lost_s.pop(host.node, None)
        self._loop.watch(link, lambda: self._hear(host))
        link.send("welcome")
        self._on_ready(host.node)
        self._hear_all(host, messages[1:] if messages else [])

    def _hear(self, host: _Host) -> None:
        messages = host.link.receive()
        if messages is None:
            self._drop(host, "the node went away")
            return
        host.heard_s = time.monotonic()
        self._hear_all(host, messages)

    def _hear_all(self, host: _Host, messages: Sequence[Message]) -> None:
        for message in messages:
            match message["kind"]:
                case "keeper":
                    host.keeper = _to_address(message["address"])
                case "beat":
                    host.holders = {
                        Slot(host.node, name): _to_holder(held) for name, held in message["holders"].items()
                    }
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


class HostStarts:
    """Has a host started on each node that lacks one, and again where none has come of that.

    A start that goes on is waited for. Each takes a process of Ray's, which imports for seconds: on a slow machine one
    more would make all of them slower, until there is time for nothing else.

    Args:
        start: starts a host on a node, without waiting for it.
        every_s: not sooner than so long after the start before.
    """

    def __init__(self, start: Callable[[str], Start], *, every_s: float) -> None:
        self._start, self._every_s = start, every_s
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
                self._starts[node] = (now_s, self._start(node))


def _listen(ip: str, port: int) -> socket.socket:
    try:
        return socket.create_server((ip, port))
    except OSError as error:
        if not port or error.errno != errno.EADDRINUSE:
            raise
        return socket.create_server((ip, 0))


def _to_address(value: Sequence[Any] | None) -> Address | None:
    return (value[0], value[1]) if value else None


def _to_holder(value: Mapping[str, Any] | None) -> controller.Holder | None:
    return controller.Holder(**value) if value else None
