import os
import socket
import time

import pytest

from cluster.runtime.event_loop import EventLoop
from cluster.runtime.link import Link


@pytest.fixture
def loop():
    return EventLoop()


@pytest.fixture
def connect():
    """Return a function that gives both ends of a new link."""
    ends = []

    def connect():
        ends.extend(map(Link, socket.socketpair()))
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
    theirs.send("hello")
    loop.turn(5)
    assert heard == [{"kind": "hello"}]


def test_another_function_takes_the_place_of_the_first(loop, connect):
    ours, theirs = connect()
    called = []
    loop.watch(ours, lambda: (called.append("first"), loop.watch(ours, lambda: called.append("second"))))
    theirs.send("hello")
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
        others.extend(connect())
        for link in others:
            loop.watch(link, lambda: called.append("a new link"))
        called.append("the first")

    for link, _ in pairs:
        loop.watch(link, close_all)
    numbers = {link.fileno() for link, _ in pairs}
    for _, theirs in pairs:
        theirs.send("hello")
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
