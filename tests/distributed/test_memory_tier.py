"""Snapshots in real replica servers, one per node: what is left of a state when trainers, nodes or bytes are lost."""

import os
import shutil
import time
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist

from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.replicas.remote import RemoteReplicaServer
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.staging.host_memory import MOST_BUFFERS
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.ports import Finished, Interrupted, Notice
from elastic.storage import open_storage
from tests.distributed._loops import NoNotices, Watcher, lead_and_train, make_config, write_data
from tests.distributed._ranks import run_ranks as run_trainers
from tests.distributed._ranks import spec
from tests.distributed._spawn_ckpt import (
    CONFIG,
    CPU,
    build,
    get_values,
    make_checkpointer,
    make_progress,
    run_ranks,
    train,
)
from tests.memory_limit import MIB, limit_memory
from tests.tcp_proxy import TcpProxy

SECRET = "s3cret"
STORED, KEPT = 2, 5


class Nodes:
    """Three nodes, each with a replica server and one trainer; the copies of a node are on the next one."""

    def __init__(self, disks):
        self._disks = disks
        self.start()

    def start(self):
        self.replica_servers = {
            node: start_replica_server(node=node, ip="127.0.0.1", secret=SECRET, disk=str(self._disks / node))
            for node in ("n0", "n1", "n2")
        }

    @property
    def addresses(self):
        return {node: ("127.0.0.1", server.port) for node, server in self.replica_servers.items()}

    def run(self, work, num_ranks, run_dir, *args):
        """Run a function as one trainer on each of the first nodes, with its connection to its replica server."""
        connections = {node: server.open_connection() for node, server in self.replica_servers.items()}
        try:
            return run_ranks(work, num_ranks, run_dir, connections, self.addresses, *args)
        finally:
            for connection in connections.values():
                connection.close()

    def lose(self, node):
        self.replica_servers.pop(node).close()

    def list(self, node):
        server = RemoteReplicaServer(self.addresses[node], SECRET, timeout_s=10)
        try:
            return server.fetch_list()
        finally:
            server.close()

    def close(self):
        for node in list(self.replica_servers):
            self.lose(node)


@pytest.fixture
def nodes(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("disks"))
    yield nodes
    nodes.close()


def open_memory(connections):
    node = sorted(connections)[dist.get_rank()]
    memory = Memory(connections[node], node=node, secret=SECRET)
    memory.get_buffers(CPU).has_room_at_once = True
    return memory


def save_both(run_dir, connections, addresses, strategy="fsdp2"):
    """Commit one state to the storage, keep a later one in memory, and return the state of each."""
    model, optimizer = build(strategy)
    others = sorted(addresses)
    peer = addresses[others[(dist.get_rank() + 1) % len(others)]]
    checkpointer = make_checkpointer(run_dir, memory=open_memory(connections), peer=peer)
    train(model, optimizer, 1, STORED, checkpointer)
    assert checkpointer.save_now(model, optimizer, progress=make_progress(STORED), extra={"at": STORED})
    values = {STORED: get_values(model, optimizer)}
    train(model, optimizer, STORED + 1, KEPT, checkpointer)
    assert checkpointer.hand_over(model, optimizer, progress=make_progress(KEPT), extra={"at": KEPT}, copies=True)
    values[KEPT] = get_values(model, optimizer)
    train(model, optimizer, KEPT + 1, KEPT + 2, checkpointer)  # what comes after is in nobody's memory
    checkpointer.close()
    return values


def restore_newest(run_dir, connections, addresses, strategy="fsdp2"):
    model, optimizer = build(strategy, model_seed=1)
    restored = restore(
        open_storage(run_dir),
        model,
        optimizer,
        config=CONFIG,
        device=CPU,
        memory=open_memory(connections),
        replica_servers=addresses,
    )
    return restored.source, restored.progress, restored.extra, get_values(model, optimizer)


def check(results, values, *, source, step):
    for found in results:
        assert found == (source, make_progress(step), {"at": step}, values[step])


def test_trainers_that_die_find_their_state_in_the_memory_of_their_nodes_without_the_storage(tmp_path, nodes):
    values, *_ = nodes.run(save_both, 3, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    check(nodes.run(restore_newest, 3, tmp_path), values, source="memory", step=KEPT)


@pytest.mark.parametrize(("num_ranks", "strategy"), [(2, "fsdp2"), (2, "ddp"), (1, "single")])
def test_a_lost_node_is_made_up_for_by_its_copy_in_any_world(tmp_path, nodes, num_ranks, strategy):
    values, *_ = nodes.run(save_both, 3, tmp_path)
    nodes.lose("n0")
    results = nodes.run(restore_newest, num_ranks, tmp_path, strategy)
    check(results, values, source="peer", step=KEPT)


def test_what_is_left_in_no_memory_comes_from_the_storage(tmp_path, nodes):
    values, *_ = nodes.run(save_both, 3, tmp_path)
    nodes.lose("n0")
    nodes.lose("n1")  # which had the copy of n0
    check(nodes.run(restore_newest, 1, tmp_path), values, source="disk", step=STORED)


def hand_over_without_copies(run_dir, connections, addresses):
    """Keep one state with its copies, hand a later one over without; return both, and which were said to be safe."""
    model, optimizer = build("fsdp2")
    others = sorted(addresses)
    peer = addresses[others[(dist.get_rank() + 1) % len(others)]]
    safe = []

    def note_safe(progress, *, copied):
        if copied:
            safe.append(progress)

    checkpointer = make_checkpointer(run_dir, memory=open_memory(connections), peer=peer, on_kept=note_safe)
    values = {}
    for step, copies in ((STORED, True), (KEPT, False)):
        train(model, optimizer, step, step, checkpointer)
        assert checkpointer.hand_over(model, optimizer, progress=make_progress(step), extra={"at": step}, copies=copies)
        values[step] = get_values(model, optimizer)
    checkpointer.close()
    return values, [progress.step for progress in safe]


def test_what_is_handed_over_without_copies_is_there_for_as_long_as_its_node_is_and_nothing_older_is_given_up(
    tmp_path, nodes
):
    results = nodes.run(hand_over_without_copies, 3, tmp_path)
    values, safe = results[0]
    assert safe == [STORED]
    for node in nodes.replica_servers:
        held = sorted((shard.snapshot.step, shard.is_copy) for shard in nodes.list(node))
        assert held == [(STORED, False), (STORED, True), (KEPT, False)]
    check(nodes.run(restore_newest, 2, tmp_path), values, source="memory", step=KEPT)

    nodes.run(hand_over_without_copies, 3, tmp_path)
    nodes.lose("n0")
    check(nodes.run(restore_newest, 2, tmp_path), values, source="peer", step=STORED)


def store_on_disks(run_dir, connections, addresses):
    """Keep snapshots until two of them are on the disks; return the states by step."""
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, node_disk="/disk", node_disk_every_s=0.0))
    model, optimizer = build("fsdp2")
    others = sorted(addresses)
    peer = addresses[others[(dist.get_rank() + 1) % len(others)]]
    checkpointer = make_checkpointer(run_dir, config=config, memory=open_memory(connections), peer=peer)
    values = {}
    for step in range(1, 9):
        train(model, optimizer, step, step, checkpointer)
        values[step] = get_values(model, optimizer)
        checkpointer.start_save(model, optimizer, progress=make_progress(step), extra={"at": step}, tier="memory")
        checkpointer.wait_staged()
        for _ in range(20):  # as many steps that save nothing: their polls hear that the disks have it
            time.sleep(0.02)
            checkpointer.poll()
    checkpointer.close()
    return values


def test_when_all_memories_are_lost_at_once_the_disks_of_the_nodes_have_a_state(tmp_path, nodes):
    values, *_ = nodes.run(store_on_disks, 3, tmp_path)
    for node in list(nodes.replica_servers):
        nodes.lose(node)
    nodes.start()
    held = [shard for node in nodes.replica_servers for shard in nodes.list(node)]
    assert all(shard.is_on_disk for shard in held)
    steps = {shard.snapshot.step for shard in held}
    assert len(steps) == 2  # the newest, and the one before it that was known to be complete
    newest = max(steps)
    check(nodes.run(restore_newest, 3, tmp_path), values, source="disk", step=newest)
    nodes.lose("n0")  # its shard lies as a copy on the disk of n1
    check(nodes.run(restore_newest, 2, tmp_path), values, source="disk", step=newest)


def damage(nodes, node, *, copies):
    """Change a byte of each of a node's snapshots (or of the copies that it keeps) of the newest state."""
    client = ReplicaClient(nodes.replica_servers[node].open_connection(), origin="vandal")
    for held in client.fetch_list():
        if held.snapshot.step == KEPT and held.is_copy == copies:
            client.fetch_memory(held).view[held.num_bytes - 1] ^= 1
    client.close()


def test_a_damaged_snapshot_is_read_from_its_copy_and_if_that_is_damaged_too_the_one_before_counts(tmp_path, nodes):
    values, *_ = nodes.run(save_both, 3, tmp_path)
    damage(nodes, "n0", copies=False)
    check(nodes.run(restore_newest, 3, tmp_path), values, source="memory", step=KEPT)
    damage(nodes, "n1", copies=True)
    shutil.rmtree(tmp_path / "checkpoints")
    check(nodes.run(restore_newest, 3, tmp_path), values, source="memory", step=STORED)


def keep_on(run_dir, connections, addresses):
    """Two worlds of one process: the second starts from the first one's snapshot, and keeps its own."""
    memory = open_memory(connections)
    model, optimizer = build("fsdp2")
    for generation in (1, 2):
        if generation == 2:
            restored = restore(
                open_storage(run_dir),
                model,
                optimizer,
                config=CONFIG,
                device=CPU,
                memory=memory,
                replica_servers=addresses,
            )
            assert restored.progress.step == 3
        index = memory.find_index(generation=1, step=3)
        checkpointer = make_checkpointer(run_dir, generation=generation, memory=memory, restored_index=index)
        for step in range(3 * generation - 2, 3 * generation + 1):
            train(model, optimizer, step, step, checkpointer)
            assert checkpointer.hand_over(model, optimizer, progress=make_progress(step), extra={}, copies=True)
        checkpointer.close()


def test_a_process_that_outlives_its_world_keeps_as_many_snapshots_as_it_has_buffers_and_no_more(tmp_path, nodes):
    nodes.run(keep_on, 3, tmp_path)
    assert MOST_BUFFERS == 3
    for node in nodes.replica_servers:
        held = [(shard.snapshot.generation, shard.snapshot.step) for shard in nodes.list(node)]
        assert sorted(held) == [(2, 4), (2, 5), (2, 6)]


class Planned:
    """Tells of a planned change once it is asked to."""

    def __init__(self):
        self.notice = None

    def get_notice(self):
        return self.notice


def train_until_planned(folder, rank, port, connections, nodes):
    """Train until a planned change, told while the first snapshot is still copied; return how it ended, and when."""
    notices, told_s, (replica_servers, peers) = Planned(), [], nodes

    def tell(rows):
        if len(rows) == 3:
            told_s.append(time.monotonic())
            notices.notice = Notice(source="a change", deadline_s=None, keep_in="memory")

    memory = Memory(connections[f"n{rank}"], node=f"n{rank}", secret=SECRET)
    place = replace(
        spec(rank, port, world_size=3, attempt=1), node=f"n{rank}", replica_servers=replica_servers, peer=peers[rank]
    )
    config = make_config(folder, "planned", steps=100_000, every_steps=100_000)
    config = replace(config, checkpoint=replace(config.checkpoint, memory_every_steps=1))
    outcome = lead_and_train(config, place, notices=notices, observer=Watcher(tell), open_sinks=list, memory=memory)
    return outcome, time.monotonic() - told_s[0]


def test_a_planned_change_waits_for_no_copy(tmp_path, nodes):
    write_data(tmp_path)
    connections = {node: server.open_connection() for node, server in nodes.replica_servers.items()}
    proxies = [TcpProxy(nodes.replica_servers[f"n{(rank + 1) % 3}"].port, delay_s=1.0) for rank in range(3)]
    peers = [("127.0.0.1", proxy.port) for proxy in proxies]
    try:
        work = partial(train_until_planned, tmp_path)
        outcomes = run_trainers(work, 3, connections, (nodes.addresses, peers))
    finally:
        for each in (*connections.values(), *proxies):
            each.close()
    progress = outcomes[0][0].progress
    for outcome, left_s in outcomes:
        assert outcome == Interrupted(progress=progress, reason="a change")
        assert left_s < 3, "a copy takes longer: each message of it is delayed by a second, and there are three"
    for node in nodes.replica_servers:
        held = {shard.snapshot.step: shard.is_copy for shard in nodes.list(node)}
        assert not held[progress.step]
        assert not any(held.values())


def train_in_containers(folder, rank, port, connections, nodes):
    """Train a few steps, rank 1 within a limit; return what became of the run."""
    addresses, limit = nodes
    if rank == 1:
        limit.add(os.getpid())
    memory = Memory(connections[f"n{rank}"], node=f"n{rank}", secret=SECRET)
    place = replace(spec(rank, port, world_size=3, attempt=1), node=f"n{rank}", replica_servers=addresses)
    config = make_config(folder, "no-room", steps=6, every_steps=3)
    return lead_and_train(config, place, notices=NoNotices(), observer=Watcher(), open_sinks=list, memory=memory)


@pytest.mark.parametrize(("limit_mib", "num_held"), [(1000, 0), (4096, 1)])
def test_where_one_container_has_no_room_all_do_without_snapshots(tmp_path, nodes, limit_mib, num_held):
    """A GiB is to spare; the trainer needs some hundred MiB beside."""
    write_data(tmp_path)
    connections = {node: server.open_connection() for node, server in nodes.replica_servers.items()}
    with limit_memory(limit_mib * MIB) as limit:
        try:
            work = partial(train_in_containers, tmp_path)
            outcomes = run_trainers(work, 3, connections, (nodes.addresses, limit))
        finally:
            for connection in connections.values():
                connection.close()
    assert outcomes == [Finished(progress=outcomes[0].progress)] * 3
    assert [min(len(nodes.list(node)), 1) for node in nodes.replica_servers] == [num_held] * 3
