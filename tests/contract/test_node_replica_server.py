"""The replica server of a node: real ones that are killed, do not start or hang, and a host that never waits."""

import errno
import os
import signal
import time
from itertools import pairwise

import pytest

from cluster.runtime.node import replica_server as module
from cluster.runtime.node.replica_server import NodeReplicaServer
from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.process import launch_replica_server
from elastic.checkpoint.replicas.remote import RemoteReplicaServer

SECRET = "s3cret"


def launch(port, ip="127.0.0.1"):
    return launch_replica_server(node="a", ip=ip, secret=SECRET, port=port)


class Loop:
    """The host's, which must not be held up."""

    def __init__(self, start=launch):
        self.changes: list[int | None] = []
        self.replica_server = NodeReplicaServer(
            start, on_changed=lambda: self.changes.append(self.replica_server.get_port())
        )
        self.longest_s = 0.0

    def turn_until(self, condition, *, timeout_s=10.0):
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until_s
            self.turn()

    def turn(self):
        start_s = time.monotonic()
        self.replica_server.check()
        self.longest_s = max(self.longest_s, time.monotonic() - start_s)
        time.sleep(0.05)

    def close(self):
        if self.replica_server.current is not None:
            self.replica_server.current.process.kill()
            self.replica_server.current.close()
        for process in self.replica_server._ending:
            process.wait()


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


def test_a_killed_replica_server_is_back_where_it_was_within_10_s_while_its_host_goes_on(loop):
    loop.replica_server.start()
    first = loop.replica_server.current
    assert first is not None
    port = loop.replica_server.get_port()
    client = ReplicaClient(first.open_connection(), origin="1-0")
    assert client.fetch_list() == []
    os.kill(first.process.pid, signal.SIGKILL)
    loop.turn_until(lambda: loop.replica_server.get_port() is None)
    loop.turn_until(lambda: loop.replica_server.get_port() is not None)
    assert loop.replica_server.get_port() == port, "other nodes look for it there"
    assert loop.changes == [None, port]
    stranger = RemoteReplicaServer(("127.0.0.1", port), SECRET, timeout_s=10)
    assert stranger.fetch_list() == []
    stranger.close()
    assert ReplicaClient(loop.replica_server.current.open_connection(), origin="2-0").fetch_list() == []
    assert loop.longest_s < 0.5


def test_one_that_the_kernel_has_no_memory_for_is_tried_again_ever_less_often(monkeypatch, capsys):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.1)
    tries_s: list[float] = []

    def refuse(port):
        tries_s.append(time.monotonic())
        if len(tries_s) < 4:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return launch(port)

    loop = Loop(refuse)
    loop.replica_server.start()
    assert loop.replica_server.current is None
    loop.turn_until(lambda: loop.replica_server.get_port() is not None)
    pauses_s = [later - earlier for earlier, later in pairwise(tries_s)]
    assert [pause_s >= wanted_s for pause_s, wanted_s in zip(pauses_s, (0.1, 0.2, 0.4), strict=True)] == [True] * 3
    said = capsys.readouterr().out
    assert (
        "no replica server can be started: Cannot allocate memory; trainers train on without snapshots in memory"
        in said
    )
    assert "another replica server serves after" in said
    loop.close()


def test_one_that_ends_while_it_starts_is_tried_again_and_its_host_goes_on(monkeypatch, capsys):
    loop = Loop(lambda port: launch(port, ip="203.0.113.1"))  # TEST-NET-3: no address of this machine
    start_s = time.monotonic()
    loop.replica_server.start()
    assert time.monotonic() - start_s < module.FIRST_WAIT_S
    assert loop.replica_server.get_port() is None
    assert "the replica server did not start: the replica server ended while it started" in capsys.readouterr().out
    loop.turn_until(lambda: loop.replica_server.current is not None)
    loop.turn_until(lambda: loop.replica_server.current is None)
    assert loop.longest_s < 0.5
    loop.close()


def test_one_that_hangs_while_it_starts_holds_its_host_up_for_nothing_but_the_first_wait(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.2)
    monkeypatch.setattr(module, "START_LIMIT_S", 1.0)

    def freeze(port):
        replica_server = launch(port)
        os.kill(replica_server.process.pid, signal.SIGSTOP)
        return replica_server

    loop = Loop(freeze)
    loop.replica_server.start()
    hanging = loop.replica_server.current
    loop.turn_until(lambda: loop.replica_server.current is not hanging)
    assert loop.longest_s < 0.5
    loop.close()
