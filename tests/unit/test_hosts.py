"""The coordinator's connections to hosts: who may come, who counts as there, and who as gone."""

import socket
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress

import pytest

from cluster.controller import Holder
from cluster.runtime.coordinator.nodes import hosts as module
from cluster.runtime.coordinator.nodes.hosts import Hosts
from cluster.runtime.coordinator.nodes.node_records import Nodes
from cluster.runtime.messages import TO_HOST, Beat, End, HostHello, Renew, ReplicaServerMoved, Welcome
from cluster.types import Expired, Join, Slot
from elastic.transport import Dial, Link, WireError
from elastic.transport.frames import encode
from elastic.transport.handshake import Handshake
from elastic.transport.typed import to_header

SECRET = "s3cret"


class Served:
    """Hosts, and what they called back with."""

    def __init__(self, port: int = 0) -> None:
        self.ready: list[str] = []
        self.messages: list[object] = []
        self.gone: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.links: list[Link] = []
        self.nodes = Nodes()
        self.hosts = Hosts(
            "127.0.0.1",
            self.nodes,
            port=port,
            secret=SECRET,
            on_ready=self.ready.append,
            on_message=self.messages.append,
            on_gone=lambda node, reason: self.gone.append((node, reason)),
            say=self.said.append,
        )

    def connect(self, secret: str = SECRET) -> Link:
        """Connect as a process that knows the secret would."""
        dial = Dial(("127.0.0.1", self.hosts.port), secret, purpose="coordinator", timeout_s=5)
        with closing(dial):
            while (peer := dial.turn()) is None:
                self.hosts.serve(timeout_s=0.01)
        self.links.append(Link(peer, TO_HOST, sends="waiting"))
        return self.links[-1]

    def join(self, node: str, *, pid: int = 1) -> Link:
        """Connect as the host of a node would."""
        link = self.connect()
        link.send(HostHello(node=node, pid=pid, replica_server=("127.0.0.1", 7)))
        return link

    def serve_until(self, is_so: Callable[[], object]) -> None:
        until_s = time.monotonic() + 5
        while not is_so():
            assert time.monotonic() < until_s
            self.hosts.serve(timeout_s=0.05)

    def get_lost(self) -> frozenset[str]:
        return self.nodes.get_lost(now_s=time.monotonic())

    def close(self) -> None:
        """Close all sockets; the coordinator's end with its process, so that nobody is cut off amid a last message."""
        for link in self.links:
            link.close()
        selector = self.hosts._loop._selector
        sources = [key.fileobj for key in selector.get_map().values()]
        for each in (selector, self.hosts._wake_out, *sources):
            each.close()


def read_all(link: Link) -> list[object]:
    """Return what comes until the other side closes."""
    found = []
    while (messages := link.receive(5)) is not None:
        found += messages
    return found


@pytest.fixture
def served():
    served = Served()
    yield served
    served.close()


def test_a_host_that_knows_the_secret_is_there_until_its_connection_ends(served):
    link = served.join("n1", pid=12)
    served.serve_until(lambda: served.ready)
    assert (served.ready, served.nodes.get_pids()) == (["n1"], {"n1": 12})
    assert served.nodes.get_replica_servers() == {"n1": ("127.0.0.1", 7)}
    assert served.get_lost() == frozenset()

    link.close()
    served.serve_until(lambda: served.gone)
    assert served.gone == [("n1", "the node went away")]
    assert (served.nodes.get_pids(), served.get_lost()) == ({}, {"n1"})
    served.join("n1")
    served.serve_until(lambda: len(served.ready) == 2)
    assert served.get_lost() == frozenset()


def test_a_host_that_ends_as_another_takes_its_place_is_gone_once(served):
    before = served.join("n1", pid=1)
    served.serve_until(lambda: served.ready)
    after = served.connect()
    served.hosts.serve(timeout_s=0.05)  # both are heard in one go, the new one first
    after.send(HostHello(node="n1", pid=2, replica_server=None))
    before.close()
    served.serve_until(lambda: len(served.ready) == 2)
    served.hosts.serve(timeout_s=0.05)
    assert served.gone == [("n1", "a new host took its place")]
    assert served.nodes.get_pids() == {"n1": 2}


def test_whoever_does_not_know_it_is_sent_away_unheard(served):
    with pytest.raises(WireError):
        served.connect(secret="guessed")
    served.serve_until(lambda: served.said)
    assert (served.ready, served.messages, served.nodes.get_pids()) == ([], [], {})
    assert len(served.said) == 1
    assert "127.0.0.1 was refused" in served.said[0]


def test_what_no_host_says_ends_its_own_connection_and_no_other(served):
    good, bad = served.join("n1"), served.join("n2")
    served.serve_until(lambda: len(served.ready) == 2)
    bad._socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
    served.serve_until(lambda: served.gone)
    assert served.gone[0][0] == "n2"
    assert "its connection broke" in served.gone[0][1]
    good.send(Expired(slot=Slot("n1", "cpu0")))
    served.serve_until(lambda: served.messages)
    odd = served.join("n3")
    served.serve_until(lambda: len(served.ready) == 3)
    odd.send(Join(slot=Slot("n1", "cpu0"), attempt=1))  # of ours, but no word of a host
    served.serve_until(lambda: len(served.gone) == 2)
    assert served.nodes.get_pids() == {"n1": 1}


def test_a_host_that_speaks_for_another_node_is_sent_away_unheard(served):
    for node in ("n1", "n2"):
        served.join(node)
    served.serve_until(lambda: len(served.ready) == 2)
    served.links[0].send(Expired(slot=Slot("n2", "cpu0")))
    served.serve_until(lambda: served.gone)
    assert served.gone == [("n1", "its host spoke for node 'n2'")]
    assert served.messages == []
    assert served.nodes.get_pids() == {"n2": 1}


def test_a_recorded_greeting_with_all_that_followed_is_worth_nothing_when_it_is_said_again(served):
    caller = Handshake(SECRET, role="caller", purpose="coordinator")
    hello, answer = caller.start(), b""
    with socket.create_connection(("127.0.0.1", served.hosts.port), timeout=5) as host:
        host.sendall(hello)
        host.settimeout(0.01)
        while caller.num_wanted:
            served.hosts.serve(timeout_s=0.01)
            with suppress(TimeoutError):
                answer += (data := host.recv(caller.num_wanted))
                proof = caller.feed(data)
        first = to_header(HostHello(node="n1", pid=1, replica_server=None))
        recorded = [hello, proof + encode(first, seal=caller.seals.sent, limit_bytes=1000)]
        host.sendall(recorded[1])
        served.serve_until(lambda: served.ready)
        for said in (recorded, [b"".join(recorded)], [answer, recorded[1]]):
            stranger = socket.create_connection(("127.0.0.1", served.hosts.port), timeout=5)
            with stranger, suppress(ConnectionError):  # it is sent away before it has said all
                for part in said:
                    stranger.sendall(part)
                    served.hosts.serve(timeout_s=0.02)
                while stranger.recv(4096):
                    served.hosts.serve(timeout_s=0.02)
        assert (served.ready, served.gone, served.nodes.get_pids()) == (["n1"], [], {"n1": 1})


def test_strangers_of_all_kinds_change_nothing_for_a_host_and_fill_no_memory(served):
    link = served.join("n1")
    served.serve_until(lambda: served.ready)
    tracemalloc.start()
    with ExitStack() as stack:

        def connect():
            return stack.enter_context(socket.create_connection(("127.0.0.1", served.hosts.port), timeout=5))

        for data in (b"GET / HTTP/1.0\r\n\r\n", bytes.fromhex("1603010200"), b"[1]\n", b"Solvent2half a greeting"):
            connect().sendall(data)
            served.hosts.serve(timeout_s=0.01)
        endless = connect()
        endless.setblocking(False)
        with suppress(ConnectionError):
            for _ in range(1600):
                with suppress(BlockingIOError):
                    endless.send(b"a" * 65536)
                served.hosts.serve(timeout_s=0)
            raise AssertionError("all of it was taken")
        for _ in range(2000):
            connect()
            served.hosts.serve(timeout_s=0)
        link.send(Expired(slot=Slot("n1", "cpu0")))
        start_s = time.monotonic()
        served.serve_until(lambda: served.messages)
        assert time.monotonic() - start_s < 1
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
    assert (served.gone, served.nodes.get_pids()) == ([], {"n1": 1})
    assert len(served.said) == 1


def test_a_host_that_takes_nothing_is_let_go_and_no_other_waits_for_it(served, monkeypatch):
    monkeypatch.setattr(module, "HOST_SILENT_S", 60.0)
    monkeypatch.setattr("elastic.transport.link.MAX_BACKLOG_BYTES", 1 << 20)
    stuck, other = served.join("n1"), served.join("n2")
    served.serve_until(lambda: len(served.ready) == 2)
    start_s = time.monotonic()
    while not served.gone:
        for node in ("n1", "n2"):
            served.hosts.tell(node, Renew(slots=("x" * 100_000,)))
        served.hosts.serve(timeout_s=0.01)
        other.receive(0)
        assert time.monotonic() - start_s < 10
    assert served.gone[0][0] == "n1"
    assert "untaken" in served.gone[0][1]
    assert served.nodes.get_pids() == {"n2": 1}
    stuck.close()


def test_what_it_says_of_itself_is_kept_and_the_rest_is_passed_on(served):
    link = served.join("n1")
    link.send(ReplicaServerMoved(address=("127.0.0.1", 8)))
    link.send(Beat(holders={"cpu0": Holder(group=2, group_size=1), "cpu1": None}))
    link.send(Expired(slot=Slot("n1", "cpu1")))
    served.serve_until(lambda: served.messages)
    assert served.messages == [Expired(slot=Slot("n1", "cpu1"))]
    assert served.nodes.get_replica_servers() == {"n1": ("127.0.0.1", 8)}

    served.hosts.renew_leases()
    served.hosts.tell("n1", Join(slot=Slot("n1", "cpu0"), attempt=3))
    served.hosts.tell("n2", Join(slot=Slot("n2", "cpu0"), attempt=3))  # nobody
    served.hosts.end_all("over", forget=True)
    heard = []
    while len(heard) < 4:
        heard += link.receive(5)
    welcome, renew, *rest = heard
    assert welcome == Welcome()
    assert set(renew.slots) <= {"cpu0", "cpu1"}
    assert rest == [Join(slot=Slot("n1", "cpu0"), attempt=3), End(reason="over", forget=True)]


def test_of_two_hosts_of_a_node_the_newer_one_counts(served):
    old = served.join("n1", pid=1)
    served.serve_until(lambda: served.ready)
    served.join("n1", pid=2)
    served.serve_until(lambda: len(served.ready) == 2)
    assert served.gone == [("n1", "a new host took its place")]
    assert served.nodes.get_pids() == {"n1": 2}
    assert read_all(old) == [Welcome()]
    assert served.get_lost() == frozenset()


def test_one_that_is_silent_counts_as_gone_but_our_own_sleep_is_not_its_silence(served, monkeypatch):
    monkeypatch.setattr(module, "HOST_SILENT_S", 0.4)
    link = served.join("n1")
    served.serve_until(lambda: served.ready)
    time.sleep(0.5)
    link.send(Beat(holders={}))  # it has arrived when we ask
    served.hosts.serve(timeout_s=0.05)
    assert served.gone == []
    served.serve_until(lambda: served.gone)
    assert served.gone == [("n1", "its host has been silent for 0.4 s")]
    assert read_all(link) == [Welcome()]


def test_another_thread_s_wake_ends_the_wait(served):
    served.hosts.wake()
    start_s = time.monotonic()
    served.hosts.serve(timeout_s=5)
    assert time.monotonic() - start_s < 4


def test_who_follows_a_coordinator_is_found_where_that_one_was_unless_it_is_still_there():
    first = Served()
    port = first.hosts.port
    first.join("n1")
    first.serve_until(lambda: first.ready)
    beside = Served(port)
    assert beside.hosts.port not in (0, port)
    beside.close()
    first.close()
    after = Served(port)
    assert after.hosts.port == port
    after.join("n1")
    after.serve_until(lambda: after.ready)
    after.close()
