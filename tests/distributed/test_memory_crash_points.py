"""Killed with -9 at any single operation of its snapshots, a trainer or a replica server costs no state that was
acknowledged.

Two nodes keep each other's copies. Generation 1 has a trainer on each: step 1 goes to the storage, step 2 to memories.
In generation 2 the first trainer goes on alone, with larger buffers: it restores step 2 and keeps three more. There its
replica server (of n0) only has originals, and its peer's (of n1) only copies. One process dies at one operation; what
is left is loaded, then again after each further loss of a node. The three tests take four minutes on 2 cores.
"""

import json
import mmap
import os
import shutil
import signal
import socket
import sys
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.storage import open_storage
from elastic.transport import WireError
from tests.distributed._crash_points import count_operations, fork, run_forked
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

SECRET = "s3cret"
NODES = ("n0", "n1")
STORED, HANDED_OVER, LAST = 1, 2, 5
TRAINER_OPERATIONS = [
    *((socket.socket, name) for name in ("sendall", "sendmsg", "recv", "recv_into", "recvmsg_into", "connect")),
    *((os, name) for name in ("memfd_create", "ftruncate", "close")),
    (mmap, "mmap"),
    (torch.Tensor, "copy_"),
    (torch.Tensor, "__setitem__"),
]
WORKERS = 2
"""Processes that work through the points side by side."""


def train_and_die(say, fatal, *args):
    count_operations(TRAINER_OPERATIONS, fatal, lambda name: say(f"operation {name}"))
    train_both_generations(say, *args)


def train_both_generations(say, run_dir, rank, connections, addresses):
    """Be one of two trainers, then, as the first, go on alone; say what is acknowledged, end if a snapshot is not."""
    connections[NODES[1 - rank]].close()
    memory = Memory(connections[NODES[rank]], node=NODES[rank], secret=SECRET)
    kept = []

    def keep(checkpointer, model, optimizer, step):
        say(f"started {step}")
        checkpointer.start_save(model, optimizer, progress=make_progress(step), extra={}, tier="memory")
        checkpointer.finish("memory")
        return rank != 0 or step in kept  # only the first one is told

    def tell(progress, *, copied):
        if copied:
            kept.append(progress.step)
            say(f"kept {progress.step}")

    def make(generation, index=None):
        return make_checkpointer(
            run_dir / "storage",
            generation=generation,
            memory=memory,
            peer=addresses[NODES[1 - rank]],
            restored_index=index,
            on_kept=tell,
            on_committed=lambda progress: say(f"committed {progress.step}"),
        )

    dist.init_process_group("gloo", store=dist.FileStore(str(run_dir / "store"), 2), rank=rank, world_size=2)
    model, optimizer = build("fsdp2")
    checkpointer = make(1)
    train(model, optimizer, 1, STORED, checkpointer)
    say(f"started {STORED}")
    assert checkpointer.save_now(model, optimizer, progress=make_progress(STORED), extra={})
    train(model, optimizer, STORED + 1, HANDED_OVER, checkpointer)
    is_kept = keep(checkpointer, model, optimizer, HANDED_OVER)
    checkpointer.close()
    dist.destroy_process_group()
    if rank != 0 or not is_kept:
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, optimizer = build("fsdp2", model_seed=1)
    restored = load(run_dir, model, optimizer, memory, addresses)
    assert restored.progress.step == HANDED_OVER
    checkpointer = make(2, memory.find_index(generation=1, step=HANDED_OVER))
    for step in range(HANDED_OVER + 1, LAST + 1):
        train(model, optimizer, step, step, checkpointer)
        if not keep(checkpointer, model, optimizer, step):
            return
    checkpointer.close()


def get_expected(run_dir):
    """Return the values of each step."""
    (values,) = run_ranks(train_alone, 1, run_dir)
    return values


def train_alone(_run_dir):
    model, optimizer = build("fsdp2")
    values = {0: None}
    for step in range(1, LAST + 1):
        train(model, optimizer, step, step)
        values[step] = get_values(model, optimizer)
    return values


def load(run_dir, model, optimizer, memory, addresses):
    storage = open_storage(run_dir / "storage")
    return restore(storage, model, optimizer, config=CONFIG, device=CPU, memory=memory, replica_servers=addresses)


@contextmanager
def dying_at(fatal, log):
    """Let a replica server that starts meanwhile note its operations, and die at one of them."""
    folder = str(Path(__file__).parent / "_in_servers")
    sys.path.insert(0, folder)  # replica servers have the path of who starts them
    os.environ |= {"CRASH_LOG": str(log), "CRASH_AT": "" if fatal is None else str(fatal)}
    yield
    del os.environ["CRASH_LOG"]
    sys.path.remove(folder)


class Survivors:
    """The replica servers that live, and the storage."""

    def __init__(self, run_dir, victim, fatal):
        self.run_dir = run_dir
        self.replica_servers = {}
        for node in NODES:
            with dying_at(fatal, run_dir / "log") if node == victim else nullcontext():
                self.replica_servers[node] = start_replica_server(node=node, ip="127.0.0.1", secret=SECRET)
        self.addresses = {node: ("127.0.0.1", server.port) for node, server in self.replica_servers.items()}

    def start_trainers(self, victim, fatal):
        """Return process and pipe of each trainer."""
        connections = {node: server.open_connection() for node, server in self.replica_servers.items()}
        work = [(train_and_die, fatal) if victim == "trainer" else (train_both_generations,), (train_both_generations,)]
        trainers = [fork(*work[rank], self.run_dir, rank, connections, self.addresses) for rank in range(2)]
        for connection in connections.values():
            connection.close()
        return trainers

    def drop_dead(self):
        for node, server in list(self.replica_servers.items()):
            if server.process.poll() is not None:
                self.lose(node)

    def lose(self, node):
        self.replica_servers.pop(node).close()

    def load(self):
        """Return what is loaded where the first living node is, or where there is none."""
        memory, addresses = None, {node: self.addresses[node] for node in self.replica_servers}
        for node, server in self.replica_servers.items():
            with suppress(WireError):  # it died just now
                memory = memory or Memory(server.open_connection(), node=node, secret=SECRET)
        model, optimizer = build("fsdp2", model_seed=2)
        restored = load(self.run_dir, model, optimizer, memory, addresses)
        if restored is None:
            return {"alive": len(addresses), "step": 0, "source": None, "values": None}
        values = get_values(model, optimizer)
        return {"alive": len(addresses), "step": restored.progress.step, "source": restored.source, "values": values}


def crash(say, run_dir, victim, fatal):
    """Let the victim die at an operation, load again and again while more is lost, and say all about it."""
    run_dir.mkdir()
    try:
        survivors = Survivors(run_dir, victim, fatal)
        (first, pipe), (other, other_pipe) = survivors.start_trainers(victim, fatal)
    except WireError:
        say(json.dumps({"is_killed": False}))  # before it was ready: there is nothing yet to lose
        return
    with pipe:
        lines = pipe.read().splitlines()
    is_killed = os.WIFSIGNALED(os.waitpid(first, 0)[1])
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    other_pipe.close()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loads = [survivors.load()]
    survivors.drop_dead()
    is_killed |= len(survivors.replica_servers) < len(NODES)
    while is_killed and survivors.replica_servers:
        nodes = sorted(survivors.replica_servers)
        survivors.lose(nodes[(fatal // 2) % len(nodes)])  # each in its turn: before an operation, and halfway through
        loads.append(survivors.load())
    for node in list(survivors.replica_servers):
        survivors.lose(node)
    said = [line.split() for line in lines]
    log = [] if victim == "trainer" else (run_dir / "log").read_text().split()
    newest = {kind: max((int(n) for what, n in said if what == kind), default=0) for kind in ("started", "kept")}
    committed = max((int(n) for what, n in said if what == "committed"), default=0)
    operations = [name for what, name in said if what == "operation"] + log
    result = {"is_killed": is_killed, "committed": committed, "loads": loads, **newest}
    say(json.dumps({**result, "operations": operations}))
    shutil.rmtree(run_dir)


def crash_everywhere(run_dir, victim):
    """Return what came of a run in which nobody dies, and of every point of this worker's share."""
    worker = dist.get_rank()
    dist.destroy_process_group()  # children make groups of their own
    folder = run_dir / f"{worker}"
    folder.mkdir()

    def run(fatal):
        (line,), _ = run_forked(crash, folder / f"{fatal}", victim, fatal)
        return json.loads(line)

    whole = run(None)
    return whole, {fatal: run(fatal) for fatal in range(worker, len(whole["operations"]), WORKERS)}


@pytest.mark.long
@pytest.mark.parametrize("victim", ["trainer", *NODES])
def test_a_kill_at_any_operation_loses_no_snapshot_that_was_acknowledged(victim, tmp_path, capsys):
    shares = run_ranks(crash_everywhere, WORKERS, tmp_path, victim, timeout_s=1200)
    expected = get_expected(tmp_path)
    whole = shares[0][0]
    assert [(load["step"], load["source"]) for load in whole["loads"]] == [(LAST, "memory")]
    points = {fatal: point for _, share in shares for fatal, point in share.items() if point["is_killed"]}
    for fatal, point in points.items():
        where = f"{victim} killed at operation {fatal}, after {point['operations'][-3:]}: {point}"
        for load in point["loads"]:
            acknowledged = max(point["kept"], point["committed"]) if load["alive"] else point["committed"]
            newest = point["started"] if load["alive"] else STORED
            assert acknowledged <= load["step"] <= newest, where
            assert load["values"] == expected[load["step"]], where
            if load["step"] > STORED:
                assert load["source"] in ("memory", "peer"), where
            elif not load["alive"]:
                assert load["source"] == ("disk" if load["step"] else None), where
    assert len(points) > 0.9 * len(whole["operations"]), "threads take turns in many ways, but most points are reached"
    assert {point["kept"] for point in points.values()} >= {0, 2, 3, 4}, "points lie in all snapshots"
    with capsys.disabled():
        names = whole["operations"]
        counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        print(f"\n{victim}: killed at {len(points)} operations; left alone, it had {len(names)} ({counts})")
