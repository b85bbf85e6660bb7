"""Snapshots that a real replica server writes to a disk, and what the next replica server on that machine makes of
them."""

import os
import resource
import signal

import pytest

from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.process import start_replica_server
from tests.contract.test_replica_server import SECRET, SIZE, Trainer


@pytest.fixture
def replica_servers(tmp_path):
    """Start replica servers of nodes whose disks outlive them."""
    running = []

    def start(node, folder="run"):
        running.append(
            start_replica_server(node=node, ip="127.0.0.1", secret=SECRET, disk=str(tmp_path / node / folder))
        )
        return running[-1]

    yield start
    for server in running:
        server.close()


def kill(server):
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()


def list_replicas(server):
    client = ReplicaClient(server.open_connection(), origin="onlooker")
    try:
        return client.fetch_list()
    finally:
        client.close()


def read(server, held):
    client = ReplicaClient(server.open_connection(), origin="onlooker")
    buffer = client.fetch_memory(held)
    client.close()
    return bytes(buffer.view)


def names(tmp_path, node="a"):
    return sorted(path.name for path in (tmp_path / node / "run").iterdir())


def store(trainer, step, complete=None):
    return trainer.client.store(generation=trainer.generation, step=step, complete=complete).result(10)


def test_own_shards_and_copies_are_there_for_the_next_replica_server_with_bytes_and_checksums(
    tmp_path, replica_servers
):
    first, peer = replica_servers("a"), replica_servers("b")
    trainer = Trainer(first)
    assert trainer.fill(0, 7, peer=peer).result(10) == ""
    saved = trainer.get_bytes(0)
    (in_memory,) = list_replicas(first)
    assert store(trainer, 7) == ""
    assert store(Trainer(peer, rank=1), 7) == ""  # which has filled nothing: what is written is the copy
    for server in (first, peer):
        kill(server)

    again, again_peer = replica_servers("a"), replica_servers("b")
    (own,), (copy,) = list_replicas(again), list_replicas(again_peer)
    assert (own.is_on_disk, own.is_copy, own.node) == (True, False, "a")
    assert (copy.is_on_disk, copy.is_copy, copy.node) == (True, True, "b")
    for held in (own, copy):
        assert (held.snapshot, held.chunks, held.checksums, held.record) == (
            *(in_memory.snapshot, in_memory.chunks, in_memory.checksums),
            in_memory.record,
        )
    assert read(again, own) == read(again_peer, copy) == saved
    client = ReplicaClient(again.open_connection(), origin="onlooker")
    assert client.fetch_held_bytes() == 0  # files take up none of the memory that is promised to snapshots
    client.close()


def test_another_life_of_the_run_sees_none_of_it(tmp_path, replica_servers):
    first = replica_servers("a")
    trainer = Trainer(first)
    trainer.fill(0, 1).result(10)
    assert store(trainer, 1) == ""
    assert list_replicas(replica_servers("a", "run-begun-anew")) == []


def test_states_before_the_newest_that_is_complete_make_room(tmp_path, replica_servers):
    trainer = Trainer(replica_servers("a"))
    for step in (1, 2, 3):
        trainer.fill(step % 2, step).result(10)
        assert store(trainer, step, complete=(1, step - 1) if step == 3 else None) == ""
    assert names(tmp_path) == [f"00000001-0000000{step}-0-of-1.snapshot" for step in (2, 3)]


def test_without_word_of_a_complete_one_a_handful_stays(tmp_path, replica_servers):
    trainer = Trainer(replica_servers("a"))
    for step in range(1, 8):
        trainer.fill(step % 2, step).result(10)
        assert store(trainer, step) == ""
    assert names(tmp_path) == [f"00000001-0000000{step}-0-of-1.snapshot" for step in (4, 5, 6, 7)]


def test_a_buffer_that_is_filled_again_meanwhile_leaves_no_file(tmp_path, replica_servers):
    trainer = Trainer(replica_servers("a"))
    trainer.fill(0, 1).result(10)
    trainer.client.begin(0, generation=1)
    assert store(trainer, 1) == ""  # nothing of that state is here any more
    assert names(tmp_path) == []


def test_a_disk_that_is_full_costs_that_file_and_not_the_snapshot(tmp_path, replica_servers):
    server = replica_servers("a")
    trainer = Trainer(server)
    trainer.fill(0, 1).result(10)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
    assert "File too large" in store(trainer, 1)
    assert names(tmp_path) == []
    assert [held.snapshot.step for held in list_replicas(server)] == [1]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    assert store(trainer, 1) == ""
    assert names(tmp_path) == ["00000001-00000001-0-of-1.snapshot"]


@pytest.mark.parametrize("end", [0, 10, SIZE, -1])
def test_torn_files_are_passed_over_and_half_written_ones_removed(tmp_path, replica_servers, end):
    server = replica_servers("a")
    trainer = Trainer(server)
    for step in (1, 2):
        trainer.fill(step % 2, step).result(10)
        assert store(trainer, step) == ""
    kill(server)
    torn, whole = sorted((tmp_path / "a" / "run").iterdir())
    torn.write_bytes(torn.read_bytes()[:end])
    (whole.parent / "00000001-00000003-0-of-1.tmp").write_bytes(b"half")
    (whole.parent / "notes.txt").write_text("not ours")
    assert [held.snapshot.step for held in list_replicas(replica_servers("a"))] == [2]
    assert names(tmp_path) == [torn.name, whole.name, "notes.txt"]
