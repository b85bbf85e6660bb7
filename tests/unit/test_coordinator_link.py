"""A host's end of the connection to its coordinator: asked, led, lost, found again."""

import contextlib
import socket
import time
from types import SimpleNamespace

import pytest

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import FROM_HOST, Beat, Bye, End, HostHello, Renew, Welcome
from cluster.runtime.node import coordinator_link as module
from cluster.runtime.node.coordinator_link import CoordinatorLink
from cluster.types import Slot, TrainerEnded
from elastic.transport import Acceptor, Link

PATIENCE_S = 60
SECRET = "s3cret"
HELLO = HostHello(node="n1", pid=1, replica_server=None)


class Chair:
    """A place where a coordinator may be: it takes connections, and says what the test has it say."""

    def __init__(self):
        self.acceptor = Acceptor(
            socket.create_server(("127.0.0.1", 0)), say=print, secret=SECRET, purpose="coordinator"
        )
        self.port = self.acceptor._listener.getsockname()[1]
        self.links = []

    def address(self, generation):
        return CoordinatorAddress(generation=generation, host="127.0.0.1", port=self.port)

    def accept(self, host):
        peers = []
        wait_until(lambda: peers.extend(self.acceptor.turn()) or host.turn() or peers)
        self.links.append(Link(peers[0], FROM_HOST, sends="waiting"))
        return self.links[-1]

    def close(self):
        for link in self.links:
            link.close()
        if self.acceptor is not None:
            self.acceptor.close()

    def leave(self):
        self.acceptor.close()
        self.acceptor = None


class Host(CoordinatorLink):
    """One that keeps what it hears."""

    def __init__(self, address):
        self.loop, self.heard, self.num_lost = EventLoop(), [], 0
        super().__init__(
            address,
            secret=SECRET,
            loop=self.loop,
            patience_s=PATIENCE_S,
            get_hello=lambda: HELLO,
            on_message=self.heard.append,
            on_lost=self.count_lost,
            say=print,
        )

    def count_lost(self):
        self.num_lost += 1

    def turn(self):
        self.loop.turn(0.005)

    def hear(self, number):
        """Return the next messages."""
        wait_until(lambda: self.turn() or len(self.heard) >= number)
        heard, self.heard[:] = self.heard[:number], self.heard[number:]
        return heard

    def notice_loss(self):
        """Return once it has found that a connection ended."""
        wait_until(lambda: self.turn() or self._link is None)


@pytest.fixture
def chairs():
    chairs = [Chair(), Chair()]
    yield chairs
    for chair in chairs:
        chair.close()


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def host(clock, chairs):
    host = Host(chairs[0].address(1))
    yield host
    host._lose()
    host.loop._selector.close()


def wait_until(condition):
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def be_led(host, chair):
    """Have the host ask, and answer; return the coordinator's end."""
    assert host.look() is None
    link = chair.accept(host)
    assert link.receive(5) == [HELLO]
    link.send(Welcome())
    assert host.hear(1) == [Welcome()]
    assert host.is_led
    return link


def test_what_is_told_before_an_answer_is_dropped(host, chairs):
    assert host.look() is None
    link = chairs[0].accept(host)
    assert not host.is_led
    assert not host.tell(Beat(holders={}))
    link.send(Welcome())
    link.send(Renew(slots=()))
    assert host.hear(2) == [Welcome(), Renew(slots=())]
    assert host.tell(Beat(holders={}))
    heard = []
    wait_until(lambda: heard.extend(link.receive(0.1)) or len(heard) == 2)
    assert heard == [HELLO, Beat(holders={})]


def test_it_is_asked_once(host, chairs):
    assert [host.look() for _ in range(3)] == [None] * 3
    chairs[0].accept(host)
    assert host.look() is None
    for _ in range(10):
        host.turn()
        assert chairs[0].acceptor.turn(0.01) == []


def test_one_that_ends_is_looked_for_at_its_seat_for_as_long_as_patience_lasts(clock, host, chairs):
    for number in (1, 2):
        coordinator = be_led(host, chairs[0])
        clock.now_s += 2 * PATIENCE_S
        coordinator.close()
        host.notice_loss()
        assert (host.is_led, host.num_lost) == (False, number)
    chairs[0].leave()
    clock.now_s += PATIENCE_S - 1
    assert host.look() is None
    clock.now_s += 2
    assert host.look() == "its coordinator ended"


def test_connections_that_nobody_answers_do_not_renew_the_patience(clock, host, chairs):
    be_led(host, chairs[0]).close()
    host.notice_loss()
    for _ in range(3):
        clock.now_s += PATIENCE_S / 4
        assert host.look() is None
        chairs[0].accept(host).close()
        host.notice_loss()
    assert host.look() is None
    clock.now_s += PATIENCE_S / 2
    assert host.look() == "its coordinator ended"


def test_one_that_has_never_reached_any_gives_up_sooner(clock, host, chairs):
    chairs[0].leave()
    assert host.look() is None
    wait_until(lambda: host.turn() or host._dial is None)
    clock.now_s += 6
    assert host.look().startswith("no coordinator answers at 127.0.0.1:")


class Stranger:
    """Somebody else, who has the port of a coordinator that is gone and sends what it likes."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.connections, self.heard = [], b""

    def answer(self, host, *, says):
        """Let the host come, say something, and hear it out until it leaves or has nothing to say."""
        self.listener.settimeout(5)
        connection, _ = self.listener.accept()
        self.connections.append(connection)
        connection.setblocking(False)
        wait_until(lambda: host.turn() or self.read(connection))
        connection.setblocking(True)
        connection.sendall(says(self.heard))
        for _ in range(20):
            host.turn()
            self.read(connection)

    def read(self, connection):
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            self.heard += connection.recv(65536)
        return self.heard

    def close(self):
        for each in (self.listener, *self.connections):
            each.close()


def frame(text):
    return len(text).to_bytes(4, "big") + text


END = frame(b'{"kind":"End","reason":"over","forget":true}')
WELCOME = frame(b'{"kind":"Welcome"}')


@pytest.mark.parametrize(
    "says",
    [
        lambda heard: WELCOME + END,
        lambda heard: heard + bytes(24) + WELCOME + END,  # its own greeting, back
        lambda heard: bytes(64) + WELCOME + END,
        lambda heard: b"HTTP/1.0 200 OK\r\n\r\n" * 10,
    ],
    ids=["old protocol", "reflected", "guessed", "http"],
)
def test_whoever_has_the_port_of_a_dead_coordinator_neither_leads_nor_learns_anything(host, chairs, clock, says):
    be_led(host, chairs[0]).close()
    host.notice_loss()
    port = chairs[0].port
    chairs[0].leave()
    stranger = Stranger(port)
    for _ in range(3):
        assert host.look() is None
        stranger.answer(host, says=says)
        assert not host.is_led
        assert host.heard == []
        assert not host.tell(Beat(holders={}))
        clock.now_s += 0.3  # until it calls again
    assert SECRET.encode() not in stranger.heard
    assert b"n1" not in stranger.heard
    assert len(stranger.heard) <= 40 * len(stranger.connections), "it was told more than the first bytes of a greeting"
    stranger.close()
    chairs[0].acceptor = Acceptor(
        socket.create_server(("127.0.0.1", port)), say=print, secret=SECRET, purpose="coordinator"
    )
    be_led(host, chairs[0])


def test_a_relay_of_the_greeting_can_say_nothing_in_the_coordinator_s_name(host, chairs):
    """It may stand between a host and the coordinator that has followed; what it adds ends the connection."""
    be_led(host, chairs[0]).close()
    host.notice_loss()
    port = chairs[0].port
    chairs[0].leave()
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(5)
        assert host.look() is None
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", chairs[1].port), timeout=5)
        with near, far:
            for side in (near, far):
                side.setblocking(False)
            peers = []

            def carry():
                for source, sink in ((near, far), (far, near)):
                    with contextlib.suppress(BlockingIOError):
                        sink.sendall(source.recv(65536))
                host.turn()
                peers.extend(chairs[1].acceptor.turn())
                return host._link is not None and peers

            wait_until(carry)
            chairs[1].links.append(Link(peers[0], FROM_HOST, sends="waiting"))
            near.sendall(frame(bytes(16) + b'{"kind":"End","reason":"over","forget":true}'))
            near.sendall(WELCOME + END + bytes(100))
            host.notice_loss()
            assert host.heard == []
            assert not host.is_led


def test_one_that_takes_connections_and_says_nothing_does_not_stall_the_host(host, chairs):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.take_address(CoordinatorAddress(generation=2, host="127.0.0.1", port=listener.getsockname()[1]))
        start_s = time.monotonic()
        for _ in range(20):
            assert host.look() is None
            host.turn()
        assert time.monotonic() - start_s < 1
        host.take_address(chairs[1].address(3))
        be_led(host, chairs[1])


def test_what_no_coordinator_says_ends_the_connection_and_not_the_host(host, chairs):
    for message in (
        Bye(reason="x"),
        TrainerEnded(slot=Slot("n", "x"), attempt=1, outcome="lost", reason=""),
    ):
        be_led(host, chairs[0]).send(message)
        host.notice_loss()
        assert host.heard == []
    be_led(host, chairs[0]).send(End(reason="over", forget=False))
    assert host.hear(1) == [End(reason="over", forget=False)]


def test_nobody_mistakes_itself_for_a_coordinator_where_the_kernel_gave_it_that_port(host, chairs, monkeypatch):
    chairs[0].leave()

    class Oneself(socket.socket):
        def connect(self, address):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Oneself)
    assert host.look() is None
    wait_until(lambda: host.turn() or host._dial is None)
    assert host._link is None


@pytest.mark.parametrize("has_answered", [False, True])
def test_a_newer_seat_is_taken_at_once(host, chairs, has_answered):
    if has_answered:
        be_led(host, chairs[0])
    else:
        assert host.look() is None
    host.take_address(chairs[1].address(2))
    assert not host.is_led
    be_led(host, chairs[1])


def test_an_older_seat_and_the_same_one_again_change_nothing(host, chairs):
    be_led(host, chairs[0])
    host.take_address(chairs[0].address(5))
    host.take_address(chairs[1].address(4))
    host.take_address(chairs[1].address(5))
    assert host.is_led
    assert host.tell(Beat(holders={}))


def test_one_that_takes_nothing_is_gone(host, chairs, monkeypatch):
    monkeypatch.setattr(module, "_SEND_S", 0.1)
    be_led(host, chairs[0])
    padding = Beat(holders={"x" * 100_000: None})
    wait_until(lambda: not host.tell(padding))
    assert not host.is_led
    be_led(host, chairs[0])


def test_a_seat_where_nobody_listens_is_called_now_and_then_and_not_all_the_time(monkeypatch):
    """A busy loop at a trainer's priority kept Ray from starting the next coordinator for two minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = CoordinatorAddress(generation=1, host="127.0.0.1", port=server.getsockname()[1])
    calls = []
    dial = module.Dial
    monkeypatch.setattr(module, "Dial", lambda *args, **options: calls.append(1) or dial(*args, **options))
    host = Host(address)
    until_s = time.monotonic() + 0.9
    while time.monotonic() < until_s:
        assert host.look() is None
        host.loop.turn(0.3)
    assert 1 <= len(calls) <= 4
    host._lose()
    host.loop._selector.close()
