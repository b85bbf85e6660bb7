import contextlib
import os
import socket
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.transport import Channel, Peer, Vocabulary, WireError

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=5,
)


@dataclass(frozen=True)
class Say:
    what: object


HEARS = Vocabulary(Say)


def pair():
    ours, theirs = socket.socketpair()
    return Channel(Peer(ours, None), HEARS), Channel(Peer(theirs, None), HEARS)


@given(what=JSON, data=st.binary())
def test_what_is_sent_is_received(what, data):
    ours, theirs = pair()
    ours.send(Say(what), [memoryview(data)], num_bytes=len(data))
    ours.close()
    assert theirs.receive() == Say(what)
    assert theirs.payload_bytes == len(data)
    out = bytearray(len(data))
    theirs.receive_into(memoryview(out))
    assert out == data
    assert theirs.receive() is None
    theirs.close()


@given(st.binary(max_size=64))
def test_garbage_is_refused_and_never_understood(data):
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(data)
    channel = Channel(Peer(theirs, None), HEARS)
    if data:
        with pytest.raises(WireError):
            channel.receive()
    else:
        assert channel.receive() is None
    channel.close()


def test_descriptors_come_with_their_message_and_are_closed_if_nobody_takes_them():
    ours, theirs = pair()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with open(os.devnull) as file:  # noqa: PTH123
        ours.send(Say("a"), descriptor=file.fileno())
        ours.send(Say("b"), descriptor=file.fileno())
    assert [theirs.receive(), theirs.receive()] == [Say("a"), Say("b")]
    os.close(theirs.take_descriptor())
    theirs.close()
    ours.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # noqa: PTH208
    with pytest.raises(WireError, match="descriptor"):
        theirs.take_descriptor()


def test_a_wait_that_ended_amid_a_message_ends_the_channel():
    ours, theirs = socket.socketpair()
    channel = Channel(Peer(theirs, None), HEARS)
    channel.set_timeout(0.05)
    ours.sendall(b"\0\0\0\x0c{")
    with pytest.raises(WireError):
        channel.receive()
    with contextlib.suppress(OSError):
        ours.sendall(b'"kind":"x"}')  # the rest comes late, and would be the length of a next message
    with pytest.raises(WireError):
        channel.receive()
    ours.close()
