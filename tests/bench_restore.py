"""How fast all ranks restore at once what lies on a disk, beside plain reads of the same files.

    python -m tests.bench_restore [--gib 2] [--rounds 3] [--folder FOLDER]

Two ranks with a replica server each. All memories are lost; the state is then read from the nodes' disks, and in the
next round from a committed checkpoint in the storage, the kernel's cache emptied before each. Beside it `dd` with
O_DIRECT, one process per file, reads the files that the state was restored from. Ours is verified and copied into the
live tensors. Prints lines `RESULT {json}`.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import get_live_state
from elastic.storage import open_storage
from tests.distributed._spawn_ckpt import CONFIG, CPU, Wide, build, make_checkpointer, make_progress, run_ranks, train

SECRET = "s3cret"
NODES = ("n0", "n1")
WIDTH = 4096
GIB = 2**30
IN_STORAGE = 1
"""The step that is saved there."""
LAYER_BYTES = 3 * 4 * WIDTH * WIDTH
"""Weights and two moments in fp32."""


def open_memory(connections):
    node = NODES[dist.get_rank()]
    memory = Memory(connections[node], node=node, secret=SECRET)
    memory.get_buffers(CPU).has_room_at_once = True
    return memory


def find_stored(disks):
    """Return the files of the newest state that all nodes have on their disks, other than the one in the storage."""
    states = {}
    for file in disks.glob("*/*.snapshot"):
        if int(file.name.split("-")[1]) == IN_STORAGE:
            continue
        states.setdefault(file.name.split("-")[1], []).append(file)
    return next((states[state] for state in sorted(states, reverse=True) if len(states[state]) == len(NODES)), [])


def save(run_dir, connections, disks, num_layers):
    """Bring one state to the storage and the next ones to the disks of the nodes."""
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, node_disk="/disk", node_disk_every_s=0.0))
    model, optimizer = build("fsdp2", make_model=lambda: Wide(WIDTH, num_layers))
    checkpointer = make_checkpointer(run_dir, config=config, memory=open_memory(connections))
    train(model, optimizer, 1, IN_STORAGE, checkpointer)
    assert checkpointer.start_save(model, optimizer, progress=make_progress(IN_STORAGE), extra={}, tier="storage")
    checkpointer.wait_staged()
    checkpointer.finish()
    step, is_stored = IN_STORAGE, torch.zeros(1)
    while not is_stored:
        step += 1
        assert checkpointer.start_save(model, optimizer, progress=make_progress(step), extra={}, tier="memory")
        checkpointer.wait_staged()
        checkpointer.finish("memory")
        for _ in range(20):
            time.sleep(0.1)
            checkpointer.poll()
        is_stored.fill_(find_stored(disks) != [])
        dist.all_reduce(is_stored, dist.ReduceOp.MIN)
    checkpointer.close()


def load(run_dir, connections, addresses, num_layers):
    """Return which step was found, how long all ranks took, and what this one took of a core."""
    model, optimizer = build("fsdp2", model_seed=1, make_model=lambda: Wide(WIDTH, num_layers))
    memory = open_memory(connections) if connections else None
    get_live_state(model, optimizer)  # which a new process makes beside its first look at what there is
    dist.barrier()
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    restored = restore(
        open_storage(run_dir), model, optimizer, config=CONFIG, device=CPU, memory=memory, replica_servers=addresses
    )
    cpu_s = time.process_time() - start_cpu_s
    dist.barrier()
    return restored.progress.step, time.monotonic() - start_s, cpu_s


def forget(files):
    """Have the kernel drop what it has of these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(files):
    start_s = time.monotonic()
    readers = [
        subprocess.Popen(["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct"], stderr=subprocess.DEVNULL)
        for file in files
    ]
    assert not any(reader.wait() for reader in readers)
    return time.monotonic() - start_s


def with_servers(disks, work, run_dir, *args, is_told_addresses=False):
    servers = {
        node: start_replica_server(node=node, ip="127.0.0.1", secret=SECRET, disk=str(disks / node)) for node in NODES
    }
    connections = {node: server.open_connection() for node, server in servers.items()}
    addresses = [{node: ("127.0.0.1", server.port) for node, server in servers.items()}] if is_told_addresses else []
    try:
        return run_ranks(work, len(NODES), run_dir, connections, *addresses, *args, timeout_s=600)
    finally:
        for connection in connections.values():
            connection.close()
        for server in servers.values():
            server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="of state, of both ranks together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured")
    args = parser.parse_args()
    num_layers = max(1, round(args.gib * GIB / LAYER_BYTES))
    folder = Path(tempfile.mkdtemp(prefix="restore-", dir=args.folder))
    try:
        disks, run_dir = folder / "disks", folder / "run"
        run_dir.mkdir()
        with_servers(disks, save, run_dir, disks, num_layers)
        files = {
            "node disks": find_stored(disks),
            "storage": list(run_dir.glob("checkpoints/*/*.safetensors")),
        }
        rates: dict[str, list[float]] = {}
        cpu_s: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for source, which in files.items():
                num_gib = sum(file.stat().st_size for file in which) / GIB
                forget(which)
                rates.setdefault(f"dd, {source}", []).append(num_gib / read_plainly(which))
                forget(which)
                if source == "node disks":
                    found = with_servers(disks, load, run_dir, num_layers, is_told_addresses=True)
                else:
                    found = run_ranks(load, len(NODES), run_dir, {}, {}, num_layers, timeout_s=600)
                assert all((step == IN_STORAGE) == (source == "storage") for step, *_ in found), found
                rates.setdefault(f"restore, {source}", []).append(num_gib / max(took_s for _, took_s, _ in found))
                cpu_s.setdefault(source, []).append(sum(one for *_, one in found) / num_gib)
        for way, each in rates.items():
            print(
                "RESULT",
                json.dumps({"way": way, "gib_per_s": round(median(each), 2), "each": [round(e, 2) for e in each]}),
            )
        for source in files:
            ratio = median(rates[f"restore, {source}"]) / median(rates[f"dd, {source}"])
            per_gib = {"ranks_cpu_s_per_gib": round(median(cpu_s[source]), 2)}
            print("RESULT", json.dumps({"way": f"{source} beside dd", "ratio": round(ratio, 2), **per_gib}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
