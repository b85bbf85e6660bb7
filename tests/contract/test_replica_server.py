"""Real replica servers, started as trainers and hosts start them; nothing here imports torch."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.replicas import client
from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.inventory import ReplicaInfo, Snapshot
from elastic.checkpoint.replicas.messages import (
    COPY_ANSWERS,
    FromTrainer,
    Opened,
    Push,
    Pushed,
    Refused,
    Seal,
    Stripe,
    Taken,
)
from elastic.checkpoint.replicas.process import launch_replica_server, start_replica_server
from elastic.checkpoint.replicas.remote import RemoteReplicaServer
from elastic.checkpoint.staging.shared_memory import allocate_buffer
from elastic.processes import find_running
from elastic.transport import Channel, Peer, WireError, connect, connect_unix, to_plain
from elastic.transport.frames import encode
from elastic.transport.typed import to_header
from tests.memory_limit import MIB, limit_memory
from tests.slow_servers import slow_checksums
from tests.tcp_proxy import TcpProxy

SECRET = "s3cret"
SIZE = 300_000
CHUNKS = [(0, 100), (100, 150_000), (150_100, 149_900)]


@contextmanager
def server(node="a"):
    process = start_replica_server(node=node, ip="127.0.0.1", secret=SECRET)
    try:
        yield process
    finally:
        process.close()


@contextmanager
def remote(process, secret=SECRET):
    client = RemoteReplicaServer(("127.0.0.1", process.port), secret, timeout_s=10)
    try:
        yield client
    finally:
        client.close()


def make_snapshot(step, *, generation=1, rank=0):
    return Snapshot(generation=generation, step=step, world_size=1, rank=rank)


class Trainer:
    """What a trainer does to a replica server, with bytes instead of tensors."""

    def __init__(self, process, *, generation=1, rank=0, num_buffers=2):
        self.generation, self.rank = generation, rank
        self.client = ReplicaClient(process.open_connection(), origin=f"{generation}-{rank}")
        self.buffers = [allocate_buffer(SIZE, name="test") for _ in range(num_buffers)]
        for index, buffer in enumerate(self.buffers):
            self.client.hold(index, buffer)

    def fill(self, index, step, *, peer=None):
        data = bytes([step % 256, index]) * (SIZE // 2)
        self.client.begin(index, generation=self.generation)
        self.buffers[index].view[:] = data
        snapshot = make_snapshot(step, generation=self.generation, rank=self.rank)
        checked = self.client.fill(index, snapshot, num_bytes=SIZE, chunks=CHUNKS, record={"of": step})
        return self.client.copy(index, snapshot, peer=("127.0.0.1", peer.port)) if peer else checked

    def get_bytes(self, index):
        return bytes(self.buffers[index].view)


def describe_copy(origin, data):
    """Return the message with which another node's replica server sends what its trainer has filled."""
    shard = ReplicaInfo(
        origin=origin,
        index=0,
        snapshot=make_snapshot(1),
        num_bytes=len(data),
        chunks=((0, len(data)),),
        checksums=None,
        record=None,
        is_copy=False,
        is_on_disk=False,
        node="b",
    )
    return Push(shard=shard, capacity=len(data))


def dial(process):
    return Channel(connect(("127.0.0.1", process.port), SECRET, purpose="replicas"), COPY_ANSWERS)


def ask(channel, message, payload=(), *, num_bytes=0):
    channel.send(message, payload, num_bytes=num_bytes)
    return channel.receive()


def push(channel, message, payload, *, crc32):
    """Send a copy on one connection; return the last answer."""
    opened = ask(channel, message)
    if not isinstance(opened, Opened):
        return opened
    copy = {"origin": message.shard.origin, "index": message.shard.index, "ticket": opened.ticket}
    stripe = Stripe(**copy, first=0, stop=1)
    assert ask(channel, stripe, payload, num_bytes=message.shard.num_bytes) == Taken()
    return ask(channel, Seal(**copy, checksums=(crc32,)))


def wait_until(condition, what):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def test_a_snapshot_survives_its_trainer_and_is_served_with_its_checksums():
    with server() as process, remote(process) as stranger:
        trainer = Trainer(process)
        assert trainer.fill(0, 7).result(10) == ""
        saved = trainer.get_bytes(0)
        trainer.client.close()
        (held,) = stranger.fetch_list()
        assert (held.snapshot.step, held.record, held.is_copy, held.node) == (7, {"of": 7}, False, "a")
        assert list(held.checksums) == [zlib.crc32(saved[at : at + size]) for at, size in CHUNKS]
        part = memoryview(bytearray(1000))
        stranger.read_into(held, 99_900, part)
        assert part == saved[99_900:100_900]
        successor = ReplicaClient(process.open_connection(), origin="2-0")
        buffer = successor.fetch_memory(held)
        assert buffer is not None
        assert buffer.view == saved


def test_what_was_filled_is_listed_and_read_at_once_while_its_checksums_are_still_taken():
    with slow_checksums(s_per_mib=100.0), server() as process, remote(process) as stranger:  # 28 s
        trainer = Trainer(process)
        start_s = time.monotonic()
        checked = trainer.fill(0, 7)
        (held,) = trainer.client.fetch_list()
        assert stranger.fetch_list() == [held]
        assert (held.snapshot.step, held.checksums) == (7, None)
        part = memoryview(bytearray(1000))
        stranger.read_into(held, 99_900, part)  # with a checksum of its own: 0.1 s
        assert part == trainer.get_bytes(0)[99_900:100_900]
        assert time.monotonic() - start_s < 5
        assert not checked.done()


def test_a_copy_is_given_up_at_once_for_what_is_more_urgent():
    with server("a") as process, server("b") as peer:
        trainer, proxy = Trainer(process), TcpProxy(peer.port, delay_s=5.0)
        try:
            copied = trainer.fill(0, 1, peer=proxy)  # a message takes five seconds, and there are many
            wait_until(lambda: proxy.num_connections, "it is under way")
            time.sleep(0.1)
            trainer.client.halt_copies()
            trainer.fill(1, 2).result(10)
            assert copied.result(10) == "superseded"
        finally:
            proxy.close()
        assert trainer.client.copy(1, make_snapshot(2), peer=("127.0.0.1", peer.port)).result(10) == ""


def test_what_the_gone_have_left_is_told_apart_from_what_is_filled_again():
    with server("a") as process, server("b") as peer:
        trainer, other = Trainer(process), Trainer(process, rank=1)
        assert trainer.fill(0, 1, peer=peer).result(10) == ""
        assert other.client.fetch_left_bytes() == 0
        trainer.client.begin(1, generation=1)
        trainer.client.close()
        wait_until(lambda: other.client.fetch_left_bytes() == SIZE, "one was filled, the other one not")
        assert other.client.fetch_held_bytes() == 3 * SIZE
        assert ReplicaClient(peer.open_connection(), origin="2-0").fetch_left_bytes() == 0, (
            "a copy is not left by anyone"
        )


def test_a_trainer_that_dies_while_it_fills_leaves_only_what_was_whole():
    with server() as process, remote(process) as stranger:
        trainer = Trainer(process)
        trainer.fill(0, 1).result(10)
        trainer.fill(1, 2).result(10)
        trainer.client.begin(0, generation=1)
        trainer.buffers[0].view[:10] = b"torn torn "
        trainer.client.close()
        wait_until(lambda: [held.snapshot.step for held in stranger.fetch_list()] == [2], "the torn one is gone")


def test_a_copy_is_the_same_and_is_void_while_the_next_one_is_under_way():
    with server("a") as process, server("b") as peer, remote(peer) as stranger:
        trainer = Trainer(process)
        assert trainer.fill(0, 1, peer=peer).result(10) == ""
        assert trainer.fill(1, 2, peer=peer).result(10) == ""
        assert trainer.fill(0, 3, peer=peer).result(10) == ""
        by_step = {held.snapshot.step: held for held in stranger.fetch_list()}
        assert sorted(by_step) == [2, 3]  # two buffers here, two there
        assert all(held.is_copy and held.node == "b" for held in by_step.values())
        whole = memoryview(bytearray(SIZE))
        stranger.read_into(by_step[3], 0, whole)
        assert whole == trainer.get_bytes(0)


def test_a_lost_peer_is_told_and_another_one_takes_its_place():
    with server("a") as process, server("b") as lost, server("c") as other:
        trainer = Trainer(process)
        assert trainer.fill(0, 1, peer=lost).result(10) == ""
        os.kill(lost.process.pid, signal.SIGKILL)
        lost.process.wait()
        assert "127.0.0.1" in (problem := trainer.fill(1, 2, peer=lost).result(10)) or "gone" in problem
        assert trainer.fill(0, 3, peer=other).result(10) == ""


def test_retired_attempts_give_their_memory_back_but_for_the_step_that_was_resumed_from():
    with server("a") as process, server("b") as peer, remote(peer) as stranger:
        trainer = Trainer(process)
        trainer.fill(0, 1, peer=peer).result(10)
        trainer.fill(1, 2, peer=peer).result(10)
        newer = Trainer(process, generation=2)
        newer.fill(0, 3, peer=peer).result(10)
        assert newer.client.fetch_held_bytes() == 4 * SIZE
        newer.client.retire(before_generation=2, keep_step=2)
        assert newer.client.fetch_held_bytes() == 4 * SIZE, "their trainer lives and fills them again"
        trainer.client.release(0)
        trainer.client.close()
        wait_until(lambda: newer.client.fetch_held_bytes() == 3 * SIZE, "one was released")
        newer.client.retire(before_generation=2, keep_step=2)
        stranger.retire(before_generation=2, keep_step=2)
        assert newer.client.fetch_held_bytes() == 3 * SIZE
        assert sorted(held.snapshot.step for held in newer.client.fetch_list()) == [2, 3]
        assert sorted(held.snapshot.step for held in stranger.fetch_list()) == [2, 3]
        newer.client.retire(before_generation=2, keep_step=None)
        assert [held.snapshot.step for held in newer.client.fetch_list()] == [3]


def test_whoever_does_not_know_the_secret_is_told_nothing():
    with server() as process:
        Trainer(process).fill(0, 1).result(10)
        with pytest.raises(WireError, match=r"gone|closed|secret"), remote(process, "guess") as stranger:
            stranger.fetch_list()
        with socket.create_connection(("127.0.0.1", process.port)) as plain:
            plain.settimeout(10)
            greeting = plain.recv(32)
            plain.sendall(greeting)  # sent back as it came: its answer is not ours
            answer = plain.recv(32)
            plain.sendall(answer)
            assert plain.recv(1) == b""


def send_plain(channel, plain, num_bytes=0):
    """Send JSON that need be no message of ours."""
    seal = channel._seals.sent if channel._seals else None
    channel._socket.sendall(encode({**plain, "bytes": num_bytes}, seal=seal, limit_bytes=2**26))


SHARD = to_header(describe_copy("1-0", b"x").shard) | {"snapshot": to_header(make_snapshot(1))}
READ = {"kind": "Read", "origin": "1-0", "index": 0, "start": 0, "size": 1, "sums": False}


@pytest.mark.parametrize(
    "plain",
    [
        {"kind": "Nonsense"},
        {"kind": "Read"},
        {**READ, "snapshot": {"step": 1}},
        {**READ, "snapshot": {"kind": "ReplicaInfo"}},
        {"kind": "Retire"},
        {"kind": "Retire", "before_generation": "2", "keep_step": None},
        {"kind": "Push", "origin": "x", "index": 0},
        {"kind": "Push", "shard": SHARD, "capacity": 1},  # not a copy
        {"kind": "Push", "shard": {**SHARD, "origin": "x"}, "capacity": 0},
        {"kind": "Push", "shard": {**SHARD, "origin": "x", "chunks": [[0, 2]]}, "capacity": 1},
        {"kind": "Stripe", "origin": "1-0", "index": 0, "ticket": 0, "first": 0, "stop": 1},
        {"kind": "Seal", "origin": "1-0", "index": 0, "ticket": 0, "checksums": []},
        {"kind": "Hold", "origin": "x", "index": 0, "num_bytes": 1},  # only over the Unix socket
    ],
)
def test_a_message_that_makes_no_sense_ends_its_connection_and_nothing_else(plain):
    with server() as process:
        trainer = Trainer(process)
        trainer.fill(0, 1).result(10)
        channel = dial(process)
        send_plain(channel, plain)
        assert channel.receive() is None
        channel.close()
        assert [held.snapshot.step for held in trainer.client.fetch_list()] == [1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
SIZES = st.sampled_from([-(2**70), -1, 0, 1, 2, SIZE, SIZE + 1, 2**50, 2**63, 2**70])
"""No number between: a copy of GiB would be made room for."""


def build(hint):
    """Return values of a type that a message may have."""
    simple = {int: SIZES, str: st.sampled_from(["", "1-0", "x"]), bool: st.booleans(), type(None): st.none()}
    if hint in (object, Any):
        return JSON
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        return st.builds(hint, **{name: build(of) for name, of in get_type_hints(hint).items()})
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return st.lists(build(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(build, get_args(hint)))
    return st.one_of(*map(build, get_args(hint)))


SAID = st.one_of([build(kind) for kind in get_args(FromTrainer)])
KINDS = [kind.__name__ for kind in get_args(FromTrainer)]
FRAMES = (
    st.builds(lambda message: json.dumps(to_header(message) | {"bytes": 0}, default=to_plain).encode(), SAID)
    | st.builds(
        lambda kind, rest: json.dumps({**rest, "kind": kind, "bytes": 0}).encode(),
        st.sampled_from(KINDS),
        st.dictionaries(st.sampled_from(["index", "snapshot", "shard", "origin", "start", "chunks"]), JSON),
    )
    | st.binary(max_size=200)
)


@pytest.fixture(scope="module")
def one_server():
    with server() as process:
        yield process


@settings(max_examples=150, deadline=None)
@given(frames=st.lists(FRAMES, min_size=1, max_size=4), is_trainer=st.booleans(), raw=st.binary(max_size=100))
def test_whatever_bytes_come_the_replica_server_serves_on(one_server, frames, is_trainer, raw):
    """From a trainer of its node, or with the run's secret: with the right frame around anything, and without one."""
    if is_trainer:
        connection, seal = one_server.open_connection(), None
    else:
        peer = connect(("127.0.0.1", one_server.port), SECRET, purpose="replicas")
        connection, seal = peer.socket, peer.seals.sent
    with connection, suppress(OSError):  # it ends the connection before all has come
        for text in frames:
            connection.sendall(len(text).to_bytes(4, "big") + (seal.make(text) if seal else b"") + text)
        connection.sendall(raw)
    onlooker = ReplicaClient(one_server.open_connection(), origin="onlooker")
    onlooker.fetch_list()
    onlooker.close()
    assert one_server.process.poll() is None


def test_a_read_beyond_the_end_is_refused():
    with server() as process:
        trainer = Trainer(process)
        trainer.fill(0, 1).result(10)
        with remote(process) as stranger, pytest.raises(WireError):
            (held,) = stranger.fetch_list()
            stranger.read_into(held, SIZE - 1, memoryview(bytearray(2)))


def test_a_copy_that_was_damaged_on_the_way_is_refused():
    with server() as process:
        channel = dial(process)
        header, crc32 = describe_copy("1-0", b"good"), zlib.crc32(b"good")
        assert isinstance(push(channel, header, [memoryview(b"baad")], crc32=crc32), Refused)
        assert push(channel, header, [memoryview(b"good")], crc32=crc32) == Pushed()
        channel.close()


def test_a_copy_that_the_container_has_no_room_for_is_refused_and_nobody_is_killed():
    with server("a") as process, server("b") as peer, limit_memory(200 * MIB) as limit:
        limit.add(peer.process.pid)
        trainer = Trainer(process)
        problem = trainer.fill(0, 1, peer=peer).result(10)
        assert "the peer has 0." in problem
        assert "checkpoint.memory=node" in problem
        limit.set(2048 * MIB)
        assert trainer.fill(1, 2, peer=peer).result(10) == ""


def test_room_that_was_promised_to_a_copy_is_not_given_to_another_one():
    data = bytes(100 * MIB)
    crc32 = zlib.crc32(data)
    header, other = (describe_copy(origin, data) for origin in ("1-0", "1-1"))
    with server() as process, limit_memory(2048 * MIB) as limit:
        limit.add(process.process.pid)
        local = ReplicaClient(process.open_connection(), origin="2-0")
        slow, fast = (dial(process) for _ in range(2))
        limit.set(limit.get_used() + (256 + 150) * MIB)

        def send_slowly():
            yield memoryview(data)[:1000]
            wait_until(lambda: local.fetch_held_bytes() == len(data), "it is promised room")
            assert isinstance(push(fast, other, [memoryview(data)], crc32=crc32), Refused)
            yield memoryview(data)[1000:]

        assert push(slow, header, send_slowly(), crc32=crc32) == Pushed()
        limit.set(limit.get_used() + (256 + 150) * MIB)
        pushed = push(fast, other, [memoryview(data)], crc32=crc32)
        assert pushed == Pushed(), "what has come is promised no longer"
        slow.close()
        fast.close()


OWNER = """
import sys, time
from elastic.checkpoint.staging.shared_memory import allocate_buffer
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.process import start_replica_server
server = start_replica_server(node="a", ip="127.0.0.1", secret="x")
client = ReplicaClient(server.open_connection(), origin="1-0")
buffer = allocate_buffer(2**20, name="test")
client.hold(0, buffer)
client.begin(0, generation=1)
buffer.view[:] = b"x" * 2**20
step = Snapshot(generation=1, step=1, world_size=1, rank=0)
client.fill(0, step, num_bytes=2**20, chunks=[(0, 2**20)], record=None).result()
print(server.process.pid, flush=True)
time.sleep(60)
"""


def test_a_replica_server_ends_with_its_owner_and_leaves_nothing():
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=env, text=True)
    with owner:
        pid = int(owner.stdout.readline())
        for process in (owner.pid, pid):  # what has no name in /dev/shm cannot be left there
            assert "/memfd:" in (maps := Path(f"/proc/{process}/maps").read_text())
            assert " /dev/shm/" not in maps
        owner.kill()
    wait_until(lambda: not find_running(pid), "the replica server has ended")


def test_bytes_that_are_no_message_end_the_connection():
    ours, theirs = socket.socketpair()
    ours.sendall(b"\xff\xff\xff\xffHTTP/1.1 400")
    with pytest.raises(WireError, match="none of ours"):
        Channel(Peer(theirs, None), COPY_ANSWERS).receive()
    ours.close()
    theirs.close()


def find_next(trainer):
    try:
        return trainer.client.fetch_list() == []
    except WireError:
        return False


def test_a_trainer_goes_on_with_the_replica_server_that_follows_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_LOOK_EVERY_S", 0.05)
    about = {"node": "a", "ip": "127.0.0.1", "secret": SECRET, "folder": str(tmp_path / "replicas")}
    first = launch_replica_server(**about)
    assert first.wait_ready(30)
    trainer = Trainer(first)
    trainer.client._reconnect = lambda: connect_unix(tmp_path / "replicas")
    assert trainer.fill(0, 1).result(10) == ""
    os.kill(first.process.pid, signal.SIGKILL)
    first.close()
    wait_until(lambda: trainer.client._is_gone, "its end is seen")
    with pytest.raises(WireError):
        trainer.fill(1, 2).result(10)
    second = launch_replica_server(**about, port=first.port)
    assert second.wait_ready(30)
    assert second.port == first.port
    wait_until(lambda: find_next(trainer), "it finds the next one")
    assert trainer.fill(1, 3).result(10) == ""
    with remote(second) as stranger:
        assert [held.snapshot.step for held in stranger.fetch_list()] == [3], "what the dead one had is gone with it"
    assert trainer.fill(0, 4).result(10) == ""
    trainer.client.close()
    second.close()


def get_status(pid, field):
    """Return a number of /proc/PID/status: kB, or threads."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def test_two_thousand_strangers_that_say_nothing_cost_a_replica_server_neither_threads_nor_memory():
    with server() as process, remote(process) as known, ExitStack() as stack:
        pid = process.process.pid
        before_kb, before_threads = get_status(pid, "VmRSS"), get_status(pid, "Threads")
        for _ in range(2000):
            stack.enter_context(socket.create_connection(("127.0.0.1", process.port), timeout=5))
        assert get_status(pid, "Threads") - before_threads <= 1
        with remote(process) as one_more:
            assert (known.fetch_list(), one_more.fetch_list()) == ([], [])
        assert get_status(pid, "VmRSS") - before_kb < 20 * 1024


def test_a_hundred_megabytes_from_a_stranger_are_not_kept():
    with server() as process:
        pid = process.process.pid
        before_kb = get_status(pid, "VmRSS")
        with socket.create_connection(("127.0.0.1", process.port), timeout=5) as stranger, suppress(OSError):
            for _ in range(100):
                stranger.sendall(bytes(MIB))
            raise AssertionError("all of it was taken")
        assert get_status(pid, "VmRSS") - before_kb < 20 * 1024


def test_a_replica_server_out_of_descriptors_serves_whom_it_knows_and_lets_others_in_once_it_has_some():
    with server() as process, remote(process) as known:
        trainer = Trainer(process)
        trainer.fill(0, 1).result(10)
        assert [held.snapshot.step for held in known.fetch_list()] == [1]
        pid = process.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), hard))
        refused = ReplicaClient(process.open_connection(), origin="2-0")
        with pytest.raises(WireError):
            refused.fetch_list()
        late = socket.create_connection(("127.0.0.1", process.port), timeout=5)
        assert trainer.fill(1, 2).result(10) == ""
        assert sorted(held.snapshot.step for held in known.fetch_list()) == [1, 2]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        late.close()
        with remote(process) as after:
            assert len(after.fetch_list()) == 2
        assert len(ReplicaClient(process.open_connection(), origin="3-0").fetch_list()) == 2


def test_a_snapshot_that_fails_in_an_unforeseen_way_is_settled_all_the_same():
    with server() as process:
        trainer = Trainer(process)
        trainer.client.begin(0, generation=1)
        snapshot = Snapshot(generation=1, step=1, world_size=1, rank=0)
        settled = trainer.client.fill(0, snapshot, num_bytes=1, chunks=[(0, 2**62)], record=None)
        assert "MemoryError" in settled.result(10)
        assert trainer.fill(0, 2).result(10) == ""
        assert [held.snapshot.step for held in trainer.client.fetch_list()] == [2]
