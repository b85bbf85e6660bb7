"""The coordinator's own loop under many hosts: what of one core it takes, how soon it sees a loss, how much memory.

    python -m tests.bench_coordinator [--nodes 3 10 100 1000] [--seconds 15]

The coordinator is the real one, with its controller, records and storage; only what it asks of Ray is answered by a
stand-in. Each host is a real connection that has proved itself, over which a process of many stand-ins says what a host
with 8 trainers says: a beat each second, the times of a node's steps each second, and the row of each of 4 steps a
second from rank 0. Then one host closes its connection, and another one falls silent as a lost machine does.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.controller import Holder
from cluster.runtime.coordinator import actor
from cluster.runtime.coordinator.actor import Coordinator, Session
from cluster.runtime.coordinator.descriptors import raise_limit
from cluster.runtime.coordinator.nodes import ray_nodes
from cluster.runtime.coordinator.nodes.hosts import HOST_SILENT_S
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import (
    TO_HOST,
    Beat,
    CoordinatorMessage,
    HostHello,
    Progressed,
    Ready,
    Restored,
    Stepped,
    StepTimes,
    TrainerSaid,
)
from cluster.runtime.ray.adapter import WorkerNode
from cluster.types import Claimed, Go, Join, Kill, Leave, Park, Slot, TrainerEnded
from elastic.config import ClusterConfig, FaultConfig, RunConfig, TrainConfig
from elastic.ports import Progress
from elastic.records.rundir import format_utc
from elastic.transport import Link, connect

SECRET = "s3cret"
NUM_TRAINERS = 8
STEPS_PER_S = 4
_FORM_S = 300.0


def name_node(number: int) -> str:
    """Return a name as long as Ray's."""
    return f"{number:08d}".ljust(56, "f")


# ---- the hosts


class StandIn:
    """One host with its trainers."""

    def __init__(self, number: int, port: int, loop: EventLoop, *, num_slots: int) -> None:
        self.node, self.attempt, self.rank = name_node(number), 0, -1
        self.running: set[Slot] = set()
        self.joined: set[Slot] = set()
        self._num_slots, self._step = num_slots, 0
        self.is_silent = False
        self.link = Link(connect(("127.0.0.1", port), SECRET, purpose="coordinator"), TO_HOST, sends="at once")
        self.link.send(HostHello(node=self.node, pid=1, replica_server=("127.0.0.1", 40_000 + number)))
        loop.watch(self.link, lambda: self.hear(loop))

    def hear(self, loop: EventLoop) -> None:
        messages = self.link.receive()
        if messages is None:
            loop.unwatch(self.link)
            self.is_silent = True
            return
        for message in messages:
            self._obey(message)

    def _obey(self, message: CoordinatorMessage) -> None:
        match message:
            case Join(slot=slot, attempt=attempt):
                if attempt != self.attempt:
                    self.attempt, self.rank, self._step = attempt, -1, 0
                    self.running, self.joined = set(), set()
                self.joined.add(slot)
                self.say(slot, Ready(store_host="127.0.0.1", store_port=1, pid=1))
            case Go(slot=slot, rank=rank, local_rank=local_rank):
                self.running.add(slot)
                if local_rank == 0:
                    self.rank = rank
                if rank == 0:
                    self.say(slot, Restored(progress=Progress(), source="scratch"))
            case (
                Leave(slot=slot, attempt=attempt) | Park(slot=slot, attempt=attempt) | Kill(slot=slot, attempt=attempt)
            ):
                self.running.discard(slot)
                if slot in self.joined and attempt == self.attempt:
                    self.joined.discard(slot)
                    left = {"outcome": "lost", "reason": "told", "exit_code": 3}
                    self.link.send(TrainerEnded(slot=slot, attempt=attempt, **left))
            case _:
                pass

    def claim(self) -> None:
        for number in range(NUM_TRAINERS):
            slot = Slot(self.node, f"gpu{number}")
            self.link.send(Claimed(slot=slot, group=1, group_size=self._num_slots, agent_pid=1))

    def beat(self) -> None:
        holder = Holder(group=1, group_size=self._num_slots)
        self.link.send(Beat(holders={f"gpu{number}": holder for number in range(NUM_TRAINERS)}))

    def step(self, *, tells: bool) -> None:
        """Finish a step; the trainers of a node tell of theirs once a second."""
        if not self.running:
            return
        self._step += 1
        now_s, first = time.time(), Slot(self.node, "gpu0")
        phases = (("train", now_s - 1 / STEPS_PER_S, now_s),)
        if self.rank == 0:
            row = {"step": self._step, "tokens": self._step, "loss": 2.0, "time_utc": format_utc(now_s)}
            self.say(first, Stepped(progress=Progress(step=self._step, tokens=self._step), row=row, phases=phases))
        elif tells:
            times = tuple(StepTimes(step=step, phases=phases) for step in range(self._step - 3, self._step + 1))
            self.say(first, Progressed(num_steps=self._step, step=self._step, times=times))

    def say(self, slot: Slot, message: Any) -> None:
        self.link.send(TrainerSaid(slot=slot, attempt=self.attempt, message=message))


def play_hosts(port: int, num_nodes: int, orders: Connection) -> None:
    """Be all hosts; "close N" and "mute N" end one of them, in one way or the other."""
    raise_limit()
    loop = EventLoop()
    hosts = [StandIn(number, port, loop, num_slots=num_nodes * NUM_TRAINERS) for number in range(num_nodes)]
    for host in hosts:
        host.claim()
    orders.send(True)
    loop.watch(orders.fileno(), lambda: _take(orders, hosts, loop))
    # spread over the second, as those of real hosts are
    quarter, turn = 0, 0
    next_s = time.monotonic()
    slices = 20
    while True:
        loop.turn(max(0.0, next_s - time.monotonic()))
        if time.monotonic() < next_s:
            continue
        next_s += 1 / slices
        turn += 1
        for host in [host for host in hosts[turn % slices :: slices] if not host.is_silent]:
            host.beat()
        if turn % (slices // STEPS_PER_S) == 0:
            quarter += 1
            for number, host in enumerate(hosts):
                if not host.is_silent:
                    host.step(tells=(number + quarter) % STEPS_PER_S == 0)


def _take(orders: Connection, hosts: list[StandIn], loop: EventLoop) -> None:
    what, number = orders.recv()
    host = hosts[number]
    if what == "close":
        loop.unwatch(host.link)
    else:
        host.beat()  # its silence begins now, and not somewhere in the second before
    host.is_silent = True
    orders.send(time.monotonic())


# ---- the coordinator


def stand_in_for_ray(num_nodes: int) -> SimpleNamespace:
    nodes = {
        name_node(number): WorkerNode(id=name_node(number), num_workers=NUM_TRAINERS, offer="spot")
        for number in range(num_nodes)
    }
    return SimpleNamespace(
        get_raylet_pid=os.getpid,
        get_own_ip=lambda: "127.0.0.1",
        get_own_actor=lambda: None,
        get_worker_nodes=lambda _: list(nodes.values()),
        get_draining_nodes=dict,
        NodeTask=lambda *_: SimpleNamespace(is_over=lambda: False, get_failure=lambda: ""),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the table."""

    nodes: int
    form_s: float
    """From the last claim until the first step of the world of all trainers."""
    core_percent: float
    """Of the whole process, in steady state."""
    serve_percent: float
    """Of the serving thread."""
    closed_s: float
    """Until a closed connection was seen."""
    again_s: float
    """From then to the first step of the world without that host."""
    silent_s: float
    """Until a silent host was seen."""
    memory_mib: float


def measure(num_nodes: int, seconds: float) -> Measured:
    """Run one coordinator with so many hosts; call it in a process of its own."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its coordinator writes on
        most = num_nodes * NUM_TRAINERS
        config = RunConfig(
            storage=str(Path(folder) / "runs"),
            run="bench",
            train=TrainConfig(global_batch=max(32, most)),
            cluster=ClusterConfig(min_workers=1, max_workers=most, gpus_per_worker=1, notices="off"),
            fault=FaultConfig(lease_s=600.0),
        )
        for module in (actor, ray_nodes):  # a bench without Ray
            module.adapter = stand_in_for_ray(num_nodes)  # pyright: ignore[reportAttributeAccessIssue]
        coordinator = Coordinator(asdict(config), session=Session(id="bench", secret=SECRET))
        assert coordinator.attach("bench", asdict(config)) == "ok"
        threading.Thread(target=poll, args=(coordinator,), daemon=True).start()
        ours, theirs = context.Pipe()
        port = coordinator.get_session().port
        hosts = context.Process(target=play_hosts, args=(port, num_nodes, theirs), daemon=True)
        hosts.start()
        try:
            return _measure(coordinator, ours, num_nodes, seconds)
        finally:
            hosts.kill()


def _measure(coordinator: Coordinator, orders: Connection, num_nodes: int, seconds: float) -> Measured:
    assert orders.recv()
    start_s = time.monotonic()
    wait_for_step(coordinator, world_size=num_nodes * NUM_TRAINERS)
    form_s = time.monotonic() - start_s
    time.sleep(3)
    cpu_s, thread_s, since_s = time.process_time(), read_thread_s("serve"), time.monotonic()
    time.sleep(seconds)
    wall_s = time.monotonic() - since_s
    core, serve = (time.process_time() - cpu_s) / wall_s, (read_thread_s("serve") - thread_s) / wall_s
    closed_s = lose(coordinator, orders, "close", num_nodes - 1)
    start_s = time.monotonic()
    wait_for_step(coordinator, world_size=(num_nodes - 1) * NUM_TRAINERS)
    again_s = time.monotonic() - start_s
    silent_s = lose(coordinator, orders, "mute", num_nodes - 2)
    return Measured(
        nodes=num_nodes,
        form_s=form_s,
        core_percent=100 * core,
        serve_percent=100 * serve,
        closed_s=closed_s,
        again_s=again_s,
        silent_s=silent_s,
        memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def poll(coordinator: Coordinator) -> None:
    """Be the driver."""
    while True:
        coordinator.poll("bench")
        time.sleep(0.5)


def wait_for_step(coordinator: Coordinator, *, world_size: int) -> None:
    until_s = time.monotonic() + _FORM_S
    while (scene := coordinator.look()).world_size != world_size or not scene.attempt_step:
        assert time.monotonic() < until_s, f"no step of {world_size} trainers: {scene.stage}, {scene.world_size}"
        time.sleep(0.02)


def lose(coordinator: Coordinator, orders: Connection, how: str, number: int) -> float:
    orders.send((how, number))
    since_s = orders.recv()
    while name_node(number) not in coordinator.get_lost_nodes():
        assert time.monotonic() < since_s + 60
        time.sleep(0.005)
    return time.monotonic() - since_s


def read_thread_s(name: str) -> float:
    """Return the processor time that a thread has taken."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(
        "| hosts | trainers | formed in s | core % | serving thread % | close seen in s | trains again in s |", end=""
    )
    print(f" silence seen in s (limit {HOST_SILENT_S:g}) | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_nodes in args.nodes:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            it = pool.submit(measure, num_nodes, args.seconds).result()
        cells = (it.form_s, it.core_percent, it.serve_percent, it.closed_s, it.again_s, it.silent_s)
        texts = [f"{cell:.2f}" if cell < 10 else f"{cell:.0f}" for cell in cells]
        print(f"| {it.nodes} | {it.nodes * NUM_TRAINERS} | {' | '.join(texts)} | {it.memory_mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()
