"""What a rank that restores hears of the memories of the nodes, some of which answer late or never."""

import os
import signal
import threading
import time

import pytest

from elastic.checkpoint.format.manifest import Manifest
from elastic.checkpoint.format.sharding import build_layout
from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.discovery import build_record, list_blocks
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.staging.shared_memory import allocate_buffer
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.ports import Progress

SECRET = "s3cret"


@pytest.fixture
def replica_servers():
    started = {node: start_replica_server(node=node, ip="127.0.0.1", secret=SECRET) for node in "ab"}
    yield started
    for server in started.values():
        os.kill(server.process.pid, signal.SIGCONT)
        server.close()


def keep(server, *, step, rank, world_size):
    """Let a trainer keep an empty shard."""
    layout = build_layout({}, {})
    manifest = Manifest(
        progress=Progress(step=step),
        generation=1,
        world_size=world_size,
        device="cpu",
        mesh=(world_size,),
        config={},
        config_hash="",
        tensors={},
        generators={},
        files={},
        extra={},
    )
    client = ReplicaClient(server.open_connection(), origin=f"{step}-{rank}")
    buffer = allocate_buffer(layout.num_bytes, name="test")
    buffer.view[:] = layout.header
    client.hold(0, buffer)
    client.begin(0, generation=1)
    snapshot = Snapshot(generation=1, step=step, world_size=world_size, rank=rank)
    record = build_record(f"f{rank}", layout, manifest)
    chunks = list_blocks(layout)
    client.fill(0, snapshot, num_bytes=layout.num_bytes, chunks=chunks, record=record).result(10)


def fetch(replica_servers):
    """Return the steps that are heard of, and how long that took."""
    memory = Memory(replica_servers["a"].open_connection(), node="a", secret=SECRET)
    start_s = time.monotonic()
    held = memory.fetch_all({node: ("127.0.0.1", server.port) for node, server in replica_servers.items()})
    return sorted(one.snapshot.step for one in held), time.monotonic() - start_s


def test_a_replica_server_that_answers_late_is_waited_for_where_no_state_is_whole_without_it(replica_servers):
    for rank, server in enumerate(replica_servers.values()):
        keep(server, step=7, rank=rank, world_size=2)
    pid = replica_servers["b"].process.pid
    os.kill(pid, signal.SIGSTOP)
    waker = threading.Timer(4.0, os.kill, (pid, signal.SIGCONT))
    waker.start()
    steps, took_s = fetch(replica_servers)
    waker.join()
    assert steps == [7, 7]
    assert 3 < took_s < 9


def test_a_replica_server_that_does_not_answer_is_not_waited_for_where_it_is_not_needed(replica_servers):
    keep(replica_servers["a"], step=7, rank=0, world_size=1)
    keep(replica_servers["b"], step=3, rank=0, world_size=1)
    os.kill(replica_servers["b"].process.pid, signal.SIGSTOP)
    steps, took_s = fetch(replica_servers)
    assert steps == [7]
    assert took_s < 5
