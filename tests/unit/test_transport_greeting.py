"""Who is let in (those that know the secret; over a Unix socket, this user's processes), and what others cost."""

import contextlib
import errno
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.transport import Acceptor, Channel, Dial, Vocabulary, WireError, connect, connect_unix, listen_unix
from elastic.transport import acceptor as module
from elastic.transport.frames import encode
from elastic.transport.handshake import Handshake

SECRET = "s3cret"
HELLO_BYTES = 8 + 32
PROOF_BYTES = 32


@dataclass(frozen=True)
class Said:
    pass


class Server:
    """An acceptor and the lines it said."""

    def __init__(self, **settings):
        self.said = []
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = listener.getsockname()
        self.acceptor = Acceptor(listener, say=self.said.append, secret=SECRET, purpose="coordinator", **settings)
        self.sockets = []

    def connect(self):
        self.sockets.append(socket.create_connection(self.address, timeout=5))
        return self.sockets[-1]

    def turn_until(self, condition):
        until_s = time.monotonic() + 5
        peers = []
        while not (found := condition()):
            peers += self.acceptor.turn(0.01)
            assert time.monotonic() < until_s
        return found

    def is_closed(self, connection):
        """Tell whether the other side has ended it, or does in the next turns."""
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            try:
                return connection.recv(1) == b""
            except ConnectionResetError:
                return True
        return False

    def let_in(self):
        """Come as one of ours; return how long that took."""
        start_s = time.monotonic()
        with contextlib.closing(Dial(self.address, SECRET, purpose="coordinator", timeout_s=5)) as dial:
            peers, ours = [], None
            while ours is None or not peers:
                ours = ours or dial.turn()
                peers += self.acceptor.turn(0.005)
        self.sockets += [ours.socket, peers[0].socket]
        return time.monotonic() - start_s

    def close(self):
        self.acceptor.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def greet(secret=SECRET, *, called="coordinator", caller="coordinator"):
    """Let two greet each other without a network; return both, and what each has sent."""
    ours, theirs = Handshake(secret, role="caller", purpose=caller), Handshake(SECRET, role="called", purpose=called)
    hello = ours.start()
    answer = theirs.feed(hello)
    proof = ours.feed(answer)
    theirs.feed(proof)
    return ours, theirs, (hello, answer, proof)


def test_two_that_know_the_secret_let_each_other_in_and_it_never_crosses_the_wire():
    ours, theirs, sent = greet()
    assert SECRET.encode() not in b"".join(sent)
    assert (ours.num_wanted, theirs.num_wanted) == (0, 0)
    for one, other in ((ours, theirs), (theirs, ours)):
        seal = one.seals.sent.make(b"x")
        other.seals.received.check(seal, b"x")
    with pytest.raises(WireError):  # its own, back
        ours.seals.received.check(ours.seals.sent.make(b"y"), b"y")


@pytest.mark.parametrize(
    "settings", [{"secret": "guessed"}, {"secret": ""}, {"caller": "replicas"}, {"called": "replicas"}]
)
def test_another_secret_or_another_purpose_opens_nothing(settings):
    with pytest.raises(WireError):
        greet(**settings)


def test_no_two_greetings_have_the_same_bytes():
    sent = [part for _ in range(3) for part in greet()[2]]
    assert len(set(sent)) == len(sent)


@given(cut=st.integers(0, HELLO_BYTES - 1), rest=st.binary(min_size=1, max_size=40))
def test_a_first_message_is_refused_as_soon_as_it_cannot_be_a_greeting(cut, rest):
    hello = Handshake(SECRET, role="caller", purpose="replicas").start()
    called = Handshake(SECRET, role="called", purpose="replicas")
    data = (hello[:cut] + rest)[:HELLO_BYTES]
    is_greeting = data[:8] == hello[: min(8, len(data))]
    if is_greeting:
        called.feed(data)
    else:
        with pytest.raises(WireError):
            called.feed(data)
    assert called.seals is None


def test_a_real_greeting_cut_at_every_byte_lets_nobody_in_and_keeps_nobody_out(server):
    """Once cut off, and once followed by silence; a replay of what was whole is worth as little."""
    caller = Handshake(SECRET, role="caller", purpose="coordinator")
    hello = caller.start()
    server.connect().sendall(hello)
    answer = b""
    while len(answer) < HELLO_BYTES - 8 + PROOF_BYTES:
        server.acceptor.turn(0.01)
        server.sockets[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            answer += server.sockets[-1].recv(100)
    whole = hello + caller.feed(answer)
    let_in = []
    for cut in range(len(whole) + 1):
        server.connect().sendall(whole[:cut])
        if cut % 2:
            server.sockets[-1].close()
        let_in += server.acceptor.turn()
    for _ in range(20):
        let_in += server.acceptor.turn(0.01)
    assert let_in == []
    assert server.let_in() < 1


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.0\r\n\r\n", bytes.fromhex("1603010200010001fc0303") + bytes(506), b"a" * (1 << 20), b"\0" * 40],
    ids=["http", "tls", "endless", "zeros"],
)
def test_other_languages_are_sent_away_at_once_and_told_once(server, data):
    for _ in range(5):
        connection = server.connect()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                connection.sendall(data)
        server.turn_until(lambda connection=connection: server.is_closed(connection))
    assert len(server.said) == 1
    assert "127.0.0.1 was refused" in server.said[0]
    assert server.let_in() < 1


def test_two_thousand_that_say_nothing_cost_no_more_than_a_few_descriptors_and_keep_nobody_out(server):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2000):
        server.connect()
        server.acceptor.turn()
    ours = len(os.listdir("/proc/self/fd")) - before - 2000  # noqa: PTH208
    assert ours <= module.MOST_PENDING
    assert server.let_in() < 1
    assert len(server.said) == 1


def test_whoever_says_nothing_for_long_enough_is_sent_away():
    server = Server(handshake_s=0.1)
    silent, half = server.connect(), server.connect()
    half.sendall(b"Solvent2 and half a greeting")
    server.turn_until(lambda: server.is_closed(silent) and server.is_closed(half))
    server.close()


class Listener(socket.socket):
    """A listener whose kernel has trouble."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors
        self.num_asked = 0
        self.bind(("127.0.0.1", 0))
        self.listen()

    def accept(self):
        self.num_asked += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "trouble")
        return super().accept()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_a_lack_of_descriptors_or_memory_pauses_for_a_moment_is_told_once_and_ends_nothing(code, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.05)
    said, listener = [], Listener([code] * 3)
    acceptor = Acceptor(listener, say=said.append, secret=SECRET)
    with contextlib.closing(acceptor), socket.create_connection(listener.getsockname()) as stranger:
        for _ in range(10):
            acceptor.turn(0.001)
        assert listener.num_asked == 1, "it asks on and on"
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        until_s = time.monotonic() + 5
        while stranger.getsockname() and len(said) < 2 and time.monotonic() < until_s:
            acceptor.turn(0.01)
        assert len(said) == 2
        assert "nobody can connect for now" in said[0]
        assert "was refused" in said[1]


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT])
def test_a_caller_that_is_gone_before_it_is_taken_keeps_nobody_out(code):
    listener = Listener([code])
    with contextlib.closing(Acceptor(listener, say=print, secret=SECRET)) as acceptor:
        calls = []

        def call():
            calls.append(connect(listener.getsockname(), SECRET, purpose="replicas"))

        thread = threading.Thread(target=call)
        thread.start()
        peers = []
        while not peers:
            peers = acceptor.turn(0.05)
        thread.join()
        for peer in (*calls, *peers):
            peer.socket.close()


def test_what_follows_a_greeting_is_left_for_the_one_that_takes_the_connection(server):
    """Sent in one go with the proof, as by a caller that does not wait."""
    caller = Handshake(SECRET, role="caller", purpose="coordinator")
    connection = server.connect()
    connection.sendall(caller.start())
    answer = b""
    while len(answer) < 32 + PROOF_BYTES:
        server.acceptor.turn(0.01)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            answer += connection.recv(100)
    proof = caller.feed(answer)
    header = {"kind": "Said", "bytes": 0}
    connection.sendall(proof + encode(header, seal=caller.seals.sent, limit_bytes=1000))
    peers = []
    while not peers:
        peers = server.acceptor.turn(0.01)
    channel = Channel(peers[0], Vocabulary(Said))
    assert channel.receive() == Said()
    channel.close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "host"
    folder.mkdir(mode=0o700)
    return folder


def test_a_process_of_this_user_is_let_in_over_a_unix_socket(folder):
    with contextlib.closing(Acceptor(listen_unix(folder), say=print, secret=None)) as acceptor:
        peer = connect_unix(folder)
        acceptor.turn(5)
        peer.socket.sendall(b"x")
        (theirs,) = acceptor.turn(5)
        assert theirs.socket.recv(5) == b"x"
        for each in (peer, theirs):
            each.socket.close()


def test_a_process_of_another_user_is_not_and_a_listener_of_another_user_is_not_trusted(folder, monkeypatch):
    said = []
    with contextlib.closing(Acceptor(listen_unix(folder), say=said.append, secret=None)) as acceptor:
        peer = connect_unix(folder)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert acceptor.turn(5) == []
        assert "it came from user" in said[0]
        assert connect_unix(folder) is None
        peer.socket.close()


def test_two_thousand_over_a_unix_socket_that_say_nothing_cost_no_more_than_a_few_descriptors(folder):
    with contextlib.ExitStack() as stack:
        acceptor = stack.enter_context(contextlib.closing(Acceptor(listen_unix(folder), say=print, secret=None)))
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(2000):
            stack.enter_context(connect_unix(folder).socket)
            acceptor.turn()
        assert len(os.listdir("/proc/self/fd")) - before - 2000 <= module.MOST_PENDING  # noqa: PTH208
        stack.enter_context(ours := connect_unix(folder).socket)
        ours.sendall(b"x")
        peers = []
        while not peers:
            peers = acceptor.turn(1)
        stack.enter_context(peers[0].socket)
        assert peers[0].socket.recv(5) == b"x"


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_folder_that_others_can_enter_is_no_place_to_listen(folder, mode):
    Path(folder).chmod(mode)
    with pytest.raises(WireError, match="not ours alone"):
        listen_unix(folder)


def test_a_caller_gives_up_on_one_that_takes_connections_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start_s = time.monotonic()
        with pytest.raises(WireError, match="it says nothing"):
            connect(listener.getsockname(), SECRET, purpose="replicas", timeout_s=0.1)
        assert time.monotonic() - start_s < 2


def test_a_caller_gives_up_where_nobody_is():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(WireError, match="Connection refused"):
        connect(address, SECRET, purpose="replicas")
