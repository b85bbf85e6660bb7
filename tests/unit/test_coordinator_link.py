"""A host's end of the connection to its coordinator: asked, led, lost, found again."""

import socket
import time
from types import SimpleNamespace

import pytest

from cluster.runtime import coordinator_link as module
from cluster.runtime.coordinator_link import CoordinatorLink
from cluster.runtime.link import Link
from cluster.runtime.seat import Seat

PATIENCE_S = 60
HELLO = {"kind": "host", "node": "n1"}


class Chair:
    """A place where a coordinator may be: it takes connections, and says what the test has it say."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.links = []

    def seat(self, epoch):
        return Seat(epoch=epoch, host="127.0.0.1", port=self.listener.getsockname()[1])

    def accept(self):
        self.listener.settimeout(5)
        self.links.append(Link(self.listener.accept()[0]))
        return self.links[-1]

    def close(self):
        for each in (self.listener, *self.links):
            each.close()


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
    asked: list[Link] = []
    host = CoordinatorLink(
        chairs[0].seat(1),
        patience_s=PATIENCE_S,
        get_hello=lambda: {"node": "n1"},
        on_asked=asked.append,
        on_lost=lambda link: link.close(),
    )
    yield host
    for link in asked:
        link.close()


def wait_until(condition):
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def be_led(host, chair):
    """Have the host ask, and answer; return the coordinator's end."""
    assert host.look() is None
    link = chair.accept()
    assert link.receive(5) == [HELLO]
    link.send("welcome")
    assert host.receive() == [{"kind": "welcome"}]
    assert host.is_led
    return link


def test_what_is_told_before_an_answer_is_dropped(host, chairs):
    assert host.look() is None
    link = chairs[0].accept()
    assert not host.is_led
    assert not host.tell("beat")
    link.send("welcome")
    link.send("renew")
    heard = []
    wait_until(lambda: heard.extend(host.receive()) or len(heard) == 2)
    assert [message["kind"] for message in heard] == ["welcome", "renew"]
    assert host.tell("beat")
    heard = []
    wait_until(lambda: heard.extend(link.receive(0.1)) or len(heard) == 2)
    assert heard == [HELLO, {"kind": "beat"}]


def test_it_is_asked_once(host, chairs):
    assert [host.look() for _ in range(3)] == [None] * 3
    chairs[0].accept()
    chairs[0].listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        chairs[0].listener.accept()


def test_one_that_ends_is_looked_for_at_its_seat_for_as_long_as_patience_lasts(clock, host, chairs):
    for _ in range(2):
        coordinator = be_led(host, chairs[0])
        clock.now_s += 2 * PATIENCE_S
        coordinator.close()
        assert host.receive() == []
        assert not host.is_led
    chairs[0].listener.close()
    clock.now_s += PATIENCE_S - 1
    assert host.look() is None
    clock.now_s += 2
    assert host.look() == "its coordinator ended"


def test_connections_that_nobody_answers_do_not_renew_the_patience(clock, host, chairs):
    be_led(host, chairs[0]).close()
    assert host.receive() == []
    for _ in range(3):
        clock.now_s += PATIENCE_S / 4
        assert host.look() is None
        chairs[0].accept().close()
        assert host.receive() == []
    assert host.look() is None
    clock.now_s += PATIENCE_S / 2
    assert host.look() == "its coordinator ended"


def test_one_that_has_never_reached_any_gives_up_sooner(clock, host, chairs):
    chairs[0].listener.close()
    assert host.look() is None
    clock.now_s += 6
    assert host.look().startswith("no coordinator answers at 127.0.0.1:")


def test_nobody_mistakes_itself_for_a_coordinator_where_the_kernel_gave_it_that_port(host, chairs, monkeypatch):
    chairs[0].listener.close()

    def connect_to_oneself(address, *, timeout):
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.bind(address)
        connection.connect(address)
        return connection

    monkeypatch.setattr(module.socket, "create_connection", connect_to_oneself)
    assert host.look() is None
    assert host.receive() == []


@pytest.mark.parametrize("has_answered", [False, True])
def test_a_newer_seat_is_taken_at_once(host, chairs, has_answered):
    if has_answered:
        be_led(host, chairs[0])
    else:
        assert host.look() is None
    host.take_seat(chairs[1].seat(2))
    assert not host.is_led
    be_led(host, chairs[1])


def test_an_older_seat_and_the_same_one_again_change_nothing(host, chairs):
    be_led(host, chairs[0])
    host.take_seat(chairs[0].seat(5))
    host.take_seat(chairs[1].seat(4))
    host.take_seat(chairs[1].seat(5))
    assert host.is_led
    assert host.tell("beat")


def test_one_that_takes_nothing_is_gone(host, chairs, monkeypatch):
    monkeypatch.setattr(module, "_SEND_S", 0.1)
    be_led(host, chairs[0])
    wait_until(lambda: not host.tell("beat", padding="x" * 100_000))
    assert not host.is_led
    be_led(host, chairs[0])
