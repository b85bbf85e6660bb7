"""How fast a copy goes from one replica server to another, and back to who restores it, beside plain sockets on this
machine.

    python -m tests.bench_copies [--gib 2] [--rounds 3]

Plain sockets: as many connections as the replica servers use, one thread at each end of each, 4 MiB at a time, from
memory that was touched to memory that was touched; no checksums. The replica servers' copies are checksummed at both
ends. All goes over the loop-back interface, so that both share its cost. Prints lines `RESULT {json}`.
"""

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.replicas.remote import RemoteReplicaServer
from elastic.checkpoint.replicas.transfer import NUM_STREAMS
from elastic.checkpoint.staging.shared_memory import GIB, allocate_buffer

PIECE_BYTES = 4 * 2**20
READ_BYTES = 16 * 2**20
BLOCK_BYTES = 2**20
RECEIVER = f"""
import socket, sys, threading
num_streams, num_bytes = int(sys.argv[1]), int(sys.argv[2])
memory = memoryview(bytearray(num_bytes * num_streams))
for at in range(0, len(memory), 4096):
    memory[at] = 1
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connections = [listener.accept()[0] for _ in range(num_streams)]
def take(number):
    mine, connection = memory[number * num_bytes :][:num_bytes], connections[number]
    while True:
        done = 0
        while done < num_bytes:
            got = connection.recv_into(mine[done:][:{PIECE_BYTES}])
            if not got:
                return
            done += got
        connection.sendall(b"x")
threads = [threading.Thread(target=take, args=(n,)) for n in range(num_streams)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def report(way: str, num_bytes: int, took_s: list[float]) -> float:
    rate = num_bytes / GIB / median(took_s)
    each = [round(num_bytes / GIB / one, 2) for one in took_s]
    print("RESULT", json.dumps({"way": way, "gib_per_s": round(rate, 2), "each": each}), flush=True)
    return rate


def send_plainly(num_bytes: int, num_rounds: int) -> float:
    """Return the rate of plain sockets."""
    part_bytes = num_bytes // NUM_STREAMS
    command = [sys.executable, "-c", RECEIVER, str(NUM_STREAMS), str(part_bytes)]
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert receiver.stdout
    port = int(receiver.stdout.readline())
    memory = memoryview(bytearray(b"x" * part_bytes * NUM_STREAMS))
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_STREAMS)]

    def send(number: int) -> None:
        mine = memory[number * part_bytes :][:part_bytes]
        for start in range(0, part_bytes, PIECE_BYTES):
            connections[number].sendall(mine[start:][:PIECE_BYTES])
        assert connections[number].recv(1)

    took_s = []
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        for _ in range(num_rounds):
            start_s = time.perf_counter()
            list(pool.map(send, range(NUM_STREAMS)))
            took_s.append(time.perf_counter() - start_s)
    for connection in connections:
        connection.close()
    receiver.wait()
    return report(f"plain sockets, {NUM_STREAMS} connections", part_bytes * NUM_STREAMS, took_s)


def copy(num_bytes: int, num_rounds: int) -> tuple[float, float]:
    """Return the rates of a copy and of reading it."""
    replica_servers = [start_replica_server(node=node, ip="127.0.0.1", secret="s") for node in ("a", "b")]
    client = ReplicaClient(replica_servers[0].open_connection(), origin="1-0")
    peer = ("127.0.0.1", replica_servers[1].port)
    buffer = allocate_buffer(num_bytes, name="bench")
    buffer.populate().join()
    client.hold(0, buffer)
    chunks = [(start, BLOCK_BYTES) for start in range(0, num_bytes, BLOCK_BYTES)]
    sums_s, copies_s = [], []
    for step in range(num_rounds + 2):  # both places of the copy are touched for the first time
        client.begin(0, generation=1)
        buffer.view[: 1 << 20] = bytes([step]) * (1 << 20)
        snapshot = Snapshot(generation=1, step=step, world_size=1, rank=0)
        start_s = time.perf_counter()
        assert client.fill(0, snapshot, num_bytes=num_bytes, chunks=chunks, record=None).result() == ""
        summed_s = time.perf_counter()
        assert client.copy(0, snapshot, peer=peer).result() == ""
        sums_s.append(summed_s - start_s)
        copies_s.append(time.perf_counter() - summed_s)
    report("checksums in the replica server", num_bytes, sums_s[2:])
    report("first copies, to memory that is found meanwhile", num_bytes, copies_s[:2])
    rate = report("copies between replica servers", num_bytes, copies_s[2:])
    return rate, read(peer, num_bytes, num_rounds)


def read(peer: tuple[str, int], num_bytes: int, num_rounds: int) -> float:
    """Read a copy as a rank does that restores it."""
    listing = RemoteReplicaServer(peer, "s", timeout_s=30)
    held = max(listing.fetch_list(), key=lambda one: one.snapshot)
    own = threading.local()

    def read_one(start: int) -> None:
        if not hasattr(own, "server"):
            own.server, own.buffer = RemoteReplicaServer(peer, "s", timeout_s=30), memoryview(bytearray(READ_BYTES))
        own.server.read_into(held, start, own.buffer)

    took_s = []
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        for _ in range(num_rounds):
            start_s = time.perf_counter()
            list(pool.map(read_one, range(0, num_bytes, READ_BYTES)))
            took_s.append(time.perf_counter() - start_s)
    return report("reads from a replica server", num_bytes, took_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    num_bytes = int(args.gib * GIB) // READ_BYTES * READ_BYTES
    plain = send_plainly(num_bytes, args.rounds)
    copied, fetched = copy(num_bytes, args.rounds)
    ratios = {"way": "beside plain sockets", "copies": round(copied / plain, 2), "reads": round(fetched / plain, 2)}
    print("RESULT", json.dumps(ratios), flush=True)


if __name__ == "__main__":
    main()
