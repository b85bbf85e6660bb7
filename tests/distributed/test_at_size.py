"""States of a quarter of a GiB, and all that was in the way of one on its way: slow wires, disks and checksums.

Two nodes with a replica server and one rank each, which keep each other's copies.
"""

import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.storage import open_storage
from elastic.storage.local import LocalStorage
from tests.distributed._spawn_ckpt import CONFIG, CPU, Wide, build, make_progress, run_ranks, train
from tests.slow_servers import slow_checksums
from tests.tcp_proxy import TcpProxy

SECRET = "s3cret"
WIDTH, LAYERS = 2048, 5
NUM_STEPS = 12
STATE_MIB = 3 * 4 * LAYERS * WIDTH * WIDTH // 2**20  # weights and two moments in fp32: 240
SOON_S = 6.0
"""What takes a moment on a machine that is not busy, and less than what is in the way in each test."""


class SlowDisk(LocalStorage):
    """Takes two seconds for each piece of a shard."""

    def write(self, key, chunks):
        def slowly():
            for piece in chunks:
                time.sleep(2.0 if memoryview(piece).nbytes > 2**20 else 0.0)
                yield piece

        return super().write(key, slowly())


class Nodes:
    """Two nodes; what is copied from one to the other may be slow."""

    def __init__(self, *, wire_delay_s=0.0):
        self.replica_servers = {
            node: start_replica_server(node=node, ip="127.0.0.1", secret=SECRET) for node in ("n0", "n1")
        }
        self.proxies = {
            node: TcpProxy(server.port, delay_s=wire_delay_s) for node, server in self.replica_servers.items()
        }
        others = {"n0": "n1", "n1": "n0"}
        self.peers = {node: ("127.0.0.1", self.proxies[other].port) for node, other in others.items()}

    @property
    def addresses(self):
        return {node: ("127.0.0.1", server.port) for node, server in self.replica_servers.items()}

    def run(self, work, run_dir, num_ranks=2, *args):
        connections = {node: server.open_connection() for node, server in self.replica_servers.items()}
        try:
            return run_ranks(work, num_ranks, run_dir, connections, self.addresses, self.peers, *args, timeout_s=120)
        finally:
            for connection in connections.values():
                connection.close()

    def lose(self, node):
        self.replica_servers.pop(node).close()

    def close(self):
        for proxy in self.proxies.values():
            proxy.close()
        for node in list(self.replica_servers):
            self.lose(node)


@pytest.fixture
def make_nodes():
    made = []

    def make(*, checksum_s_per_mib=0.0, wire_delay_s=0.0):
        with slow_checksums(s_per_mib=checksum_s_per_mib) if checksum_s_per_mib else nullcontext():
            made.append(Nodes(wire_delay_s=wire_delay_s))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()


class Rank:
    """One rank of a world, and what was told of its states."""

    def __init__(self, run_dir, connections, addresses, peers, *, is_disk_slow=False, seed=0):
        self.node = sorted(connections)[dist.get_rank()]
        self.memory = Memory(connections[self.node], node=self.node, secret=SECRET)
        self.memory.get_buffers(CPU).has_room_at_once = True
        self.run_dir, self.addresses, self.peer = run_dir, addresses, peers[self.node]
        self.model, self.optimizer = build("fsdp2", model_seed=seed, make_model=lambda: Wide(WIDTH, LAYERS))
        self.is_disk_slow = is_disk_slow

    def open(self, *, generation=1, start_step=0):
        self.checkpointer = Checkpointer(
            SlowDisk(str(self.run_dir)) if self.is_disk_slow else open_storage(self.run_dir),
            CONFIG,
            device=CPU,
            generation=generation,
            start=make_progress(start_step),
            memory=self.memory,
            peer=self.peer,
            mean_s_between_losses=20.0,  # on a CPU a snapshot takes its time of training: it must be worth it
        )

    def train(self, first_step, last_step):
        train(self.model, self.optimizer, first_step, last_step, self.checkpointer)

    def save(self, step, tier):
        saved = self.checkpointer.start_save(
            self.model, self.optimizer, progress=make_progress(step), extra={}, tier=tier
        )
        self.checkpointer.wait_staged()
        return saved

    def hand_over(self, step):
        """Hand a state over and leave; return how long that took."""
        start_s = time.monotonic()
        assert self.checkpointer.hand_over(
            self.model, self.optimizer, progress=make_progress(step), extra={}, copies=False
        )
        self.checkpointer.close()
        return time.monotonic() - start_s

    def restore(self):
        """Return what state is found, where, and how long that took."""
        start_s = time.monotonic()
        restored = restore(
            open_storage(self.run_dir),
            self.model,
            self.optimizer,
            config=CONFIG,
            device=CPU,
            memory=self.memory,
            replica_servers=self.addresses,
        )
        return restored.progress.step, restored.source, time.monotonic() - start_s


def find(run_dir, connections, addresses, peers):
    """Return what another world finds."""
    rank = Rank(run_dir, connections, addresses, peers, seed=1)
    return (*rank.restore(), float(next(rank.model.parameters()).detach().full_tensor().sum()))


def drain_while_saving(run_dir, connections, addresses, peers, tier):
    rank = Rank(run_dir, connections, addresses, peers, is_disk_slow=tier == "storage")
    rank.open()
    rank.train(1, 1)
    assert rank.save(1, tier)
    rank.train(2, 3)
    is_under_way = "storage" in rank.checkpointer._saves or rank.checkpointer._tier.is_copying
    left_s = rank.hand_over(3)
    return is_under_way, left_s, float(next(rank.model.parameters()).detach().full_tensor().sum())


@pytest.mark.parametrize("tier", ["storage", "memory"])
def test_a_drain_waits_neither_for_a_durable_save_nor_for_a_copy(tmp_path, make_nodes, tier):
    # the save: 8 pieces of 2 s; the copy: 120 MiB in 64 KiB, of which each takes 50 ms
    nodes = make_nodes(wire_delay_s=0.05 if tier == "memory" else 0.0)
    drained = nodes.run(drain_while_saving, tmp_path, 2, tier)
    expected = drained[0][2]
    for is_under_way, left_s, _ in drained:
        assert is_under_way
        assert left_s < SOON_S
    for step, source, took_s, found in nodes.run(find, tmp_path):
        assert (step, source, found) == (3, "memory", expected)
        assert took_s < SOON_S


def test_what_is_lost_while_checksums_are_taken_is_found_in_memory_at_once(tmp_path, make_nodes):
    nodes = make_nodes(checksum_s_per_mib=0.2)  # 24 s for each shard
    nodes.run(keep_and_die, tmp_path)
    for step, source, took_s, _ in nodes.run(find, tmp_path):
        assert (step, source) == (2, "memory")
        assert took_s < 3 * SOON_S  # what comes over the network is checksummed as it is read


def keep_and_die(run_dir, connections, addresses, peers):
    """Keep two states, then lose the trainers."""
    rank = Rank(run_dir, connections, addresses, peers)
    rank.open()
    for step in (1, 2):
        rank.train(step, step)
        assert rank.save(step, "memory")
        rank.checkpointer._protocol.finish_memory()
    os.kill(os.getpid(), signal.SIGKILL)


def train_for_a_while(run_dir, connections, addresses, peers, generation):
    """Go on from what there is and train as the loop does for some seconds, then lose the trainers."""
    rank = Rank(run_dir, connections, addresses, peers)
    first = rank.restore()[0] + 1 if generation > 1 else 1
    rank.memory.retire(before_generation=generation, keep_step=first - 1)
    rank.open(generation=generation, start_step=first - 1)
    made_s = []
    for step in range(first, first + NUM_STEPS):
        rank.train(step, step)
        time.sleep(0.2)
        made_s.append(f"{step} {time.monotonic()}")
        if due := rank.checkpointer.get_due(step):
            rank.save(step, due)
    (run_dir / f"made-{generation}-{dist.get_rank()}").write_text("\n".join(made_s))
    os.kill(os.getpid(), signal.SIGKILL)


def test_trainers_that_are_lost_soon_after_the_first_step_and_again_lose_five_seconds_each(tmp_path, make_nodes):
    """Nothing is ever copied: the wires take minutes."""
    nodes = make_nodes(wire_delay_s=0.2)
    for generation in (1, 2):
        nodes.run(train_for_a_while, tmp_path, 2, generation)
        made = dict(line.split() for line in (tmp_path / f"made-{generation}-0").read_text().splitlines())
        made_s = {int(step): float(at_s) for step, at_s in made.items()}
        (step, source, _, _), _ = nodes.run(find, tmp_path)
        assert source == "memory"
        assert max(made_s.values()) - made_s[step] < 5.0
