import os
import socket
import time
from dataclasses import dataclass

import pytest

from cluster.runtime.event_loop import EventLoop
from elastic.transport import Link, Peer, Vocabulary


@dataclass(frozen=True)
class Hello:
    text: str = ""


WORDS = Vocabulary(Hello)


@pytest.fixture
def loop():
    return EventLoop()


@pytest.fixture
def connect():
    """Return a function that gives both ends of a new link."""
    ends = []

    def connect():
        ends.extend(Link(Peer(end, None), WORDS, sends="at once") for end in socket.socketpair())
        return ends[-2:]

    yield connect
    for end in ends:
        end.close()


def test_calls_who_watches_what_can_be_read(loop, connect):
    ours, theirs = connect()
    silent, _ = connect()
    heard = []
    loop.watch(ours, lambda: heard.extend(ours.receive()))
    loop.watch(silent, lambda: heard.append("silence"))
    theirs.send(Hello())
    loop.turn(5)
    assert heard == [Hello()]


def test_another_function_takes_the_place_of_the_first(loop, connect):
    ours, theirs = connect()
    called = []
    loop.watch(ours, lambda: (called.append("first"), loop.watch(ours, lambda: called.append("second"))))
    theirs.send(Hello())
    loop.turn(5)
    loop.turn(5)
    assert called == ["first", "second"]


def test_waits_no_longer_than_it_is_told(loop):
    start_s = time.monotonic()
    loop.turn(0.05)
    assert 0.04 < time.monotonic() - start_s < 5


def test_an_event_of_what_was_closed_meanwhile_reaches_nobody(loop, connect):
    """Not even who has its number by then: the first of two events closes both links, and opens another one."""
    pairs = [connect() for _ in range(2)]
    others, called = [], []

    def close_all():
        for link, _ in pairs:
            loop.unwatch(link)
        while not numbers & {link.fileno() for link in others} and len(others) < 500:  # lower ones may be free as well
            others.extend(connect())
        for link in others:
            loop.watch(link, lambda: called.append("a new link"))
        called.append("the first")

    for link, _ in pairs:
        loop.watch(link, close_all)
    numbers = {link.fileno() for link, _ in pairs}
    for _, theirs in pairs:
        theirs.send(Hello())
    loop.turn(5)
    assert numbers & {link.fileno() for link in others}, "no number was given out anew: the test shows nothing"
    assert called == ["the first"]


def test_what_is_not_watched_any_more_is_closed(loop):
    reader, writer = os.pipe()
    loop.watch(reader, lambda: None)
    before = set(loop.get_descriptors())
    loop.unwatch(reader)
    assert before - set(loop.get_descriptors()) == {reader}
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)


def test_knows_how_long_it_was_awake(loop):
    loop.turn(0.05)
    assert 0.04 < loop.awake_s < 5


def test_what_a_link_could_not_send_at_once_arrives_whole_while_the_loop_goes_on(loop, connect):
    ours, theirs = connect()
    loop.watch(ours, lambda: None)
    texts = [f"{number}" * 100_000 for number in range(30)]
    for text in texts:
        assert ours.send(Hello(text))
    assert ours.has_backlog, "all of it went at once: the test shows nothing"
    heard = []
    until_s = time.monotonic() + 10
    while len(heard) < len(texts):
        assert time.monotonic() < until_s
        loop.turn(0.01)
        heard += theirs.receive(0)
    assert [message.text for message in heard] == texts
    assert not ours.has_backlog
