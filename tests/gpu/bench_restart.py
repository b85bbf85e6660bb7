"""How soon a trainer trains again on one GPU: in place, forked from its warm host, and as a new process.

    python -m tests.gpu.bench_restart            # one trainer per GPU, over NCCL
    python -m tests.gpu.bench_restart --share 4  # so many on the first GPU, over gloo

A real host with a real replica server and real trainers; this script plays the coordinator. 1.5 B parameters (31 M if a
GPU is shared), compiled block by block. Prints lines `RESULT {json}`: `compiled` counts the pieces of code that the
trainers of a world have compiled for it, `compiled_by_survivors` those by trainers of the world before (a spare trainer
that gets ready meanwhile counts in neither), `used_gib` is the memory of these GPUs. Needs neither Ray nor W&B; on a
CPU it tries a tiny model on two ranks, compiled with `--compile`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import (
    FROM_HOST,
    Claim,
    End,
    HostHello,
    Kept,
    Ready,
    ReplicaServersTold,
    Restored,
    Stepped,
    TrainerSaid,
    Welcome,
)
from cluster.runtime.node.connect import connect
from cluster.runtime.node.start_host import launch_host
from cluster.types import Claimed, Go, Join, Kill, Leave, Park, Slot, TrainerEnded, get_leave_limit_s
from elastic.config import CheckpointConfig, ClusterConfig, DataConfig, FaultConfig, RunConfig, TrainConfig, WandbConfig
from elastic.data.preparation.prepare import prepare
from elastic.models.llama import Config as ModelConfig
from elastic.transport import Acceptor, Link
from tests.plain_trainers import NODE

ROOT = Path(__file__).parents[2]
IS_GPU = torch.cuda.is_available()
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
NUM_SLOTS = torch.cuda.device_count() if IS_GPU else 2
SMALL = ModelConfig(dim=512, num_layers=8, num_heads=8, num_kv_heads=8, ffn_dim=1536, vocab_size=8192)
MODEL = (
    ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=128256, tied_head=False)
    if IS_GPU
    else ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=128, vocab_size=512)
)
LEAVE_S = get_leave_limit_s(uses_gpus=IS_GPU)
"""As the coordinator, this script kills a trainer that has not left its world by then."""
MARKS = ("ready:", " left:", "restored:", "rehearsed", "did not work", "spare")
"""Lines of the trainers' logs that are shown."""
COLD = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from elastic.config import from_dict
from elastic.ports import WorldSpec
from elastic.training.run import train
class Watch:
    def get_notice(self): return None
    def __getattr__(self, name): return lambda *_: None
    def stepped(self, progress, row): print("stepped", progress.step, flush=True)
spec = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=900, store_host="", store_port=0)
train(from_dict(json.load(sys.stdin)), spec, notices=Watch(), observer=Watch(), open_sinks=list, store=dist.HashStore())
"""


def report(**row: object) -> None:
    print("RESULT", json.dumps(row), flush=True)


class Coordinator:
    """This script's end of the link to a host with one slot per GPU."""

    def __init__(self, folder: Path, config: RunConfig, *, slots: list[str], share: int) -> None:
        self.folder = folder
        self.config = config
        self.num_compiled: Counter[int] = Counter()
        self.messages: list[tuple[str, Any]] = []
        """With the slot they are about."""
        self.pids: dict[str, int] = {}
        self.attempt = 0
        self.raylet = subprocess.Popen(["sleep", "3600"])
        listener = socket.create_server(("127.0.0.1", 0))
        address = CoordinatorAddress(generation=1, host="127.0.0.1", port=listener.getsockname()[1])
        spec = {
            "coordinator_address": asdict(address),
            "node": NODE,
            "node_ip": "127.0.0.1",
            "folder": str(folder / "host"),
            "raylet_pid": self.raylet.pid,
            "secret": "s3cret",
            "lease_s": 600.0,
            "config": asdict(config),
        }
        launch_host(spec, {**os.environ, "SOLVENT_LOG": "INFO", "TORCH_TRACE": str(folder / "trace")})
        self.host_log = folder / "host" / "host.log"
        self.num_spares = dict.fromkeys(slots, 0)
        acceptor = Acceptor(listener, say=print, secret="s3cret", purpose="coordinator")
        deadline_s = time.monotonic() + 120
        while not (peers := acceptor.turn(0.1)):
            assert time.monotonic() < deadline_s, "no host came"
        self.link = Link(peers[0], FROM_HOST, sends="waiting")
        self.replica_server = self.expect(HostHello).replica_server
        self.link.send(Welcome())
        self.agents = []
        for slot in slots:
            agent = connect(folder / "host")
            assert agent
            self.agents.append(agent)
            devices = {"CUDA_VISIBLE_DEVICES": GPUS[0 if share else int(slot.removeprefix("gpu"))]} if IS_GPU else {}
            agent.send(Claim(group=1, group_size=1, pid=1, slot=slot, env=devices))
        for slot in slots:
            self.expect(Claimed, slot=slot)

    def expect(self, kind: type, *, timeout_s: float = 100, slot: str | None = None) -> Any:
        """Return the next message of a kind; what a trainer says counts as a message of its own, with its slot."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for index, (of, message) in enumerate(self.messages):
                if isinstance(message, kind) and slot in (None, of):
                    del self.messages[index]
                    return message
            self.read()
        log = "".join(path.read_text()[-1500:] for path in (self.folder / "host").glob("*.log"))
        raise TimeoutError(f"no {kind.__name__} of {slot}; the logs end: {log}")

    def read(self) -> None:
        """Take what has come, for a moment."""
        for message in self.link.receive(0.1) or []:
            said = message.message if isinstance(message, TrainerSaid) else message
            slot = getattr(message, "slot", None)
            self.messages.append((slot.name if slot else "", said))

    def tell(self, kind: type, slots: list[str], **fields: object) -> None:
        for slot in slots:
            self.link.send(kind(slot=Slot(NODE, slot), attempt=self.attempt, **fields))

    def end(self, how: str, slots: list[str]) -> float:
        """Have the world left (or parked, or a trainer killed); return when that was asked for."""
        if how == "kill":
            self.wait_for_spare(slots[-1])
        start_s = time.monotonic()
        if how == "kill":
            os.kill(self.pids[slots[-1]], signal.SIGKILL)
            self.expect(TrainerEnded, slot=slots[-1])
            self.tell(Leave, slots[:-1])
            slots = slots[:-1]
        elif how == "park":
            self.tell(Park, slots, reason="a change", deadline_s=None, keep_in="memory")
        else:
            self.tell(Leave, slots)
        until_s = start_s + LEAVE_S if how != "park" else float("inf")
        for slot in slots:
            try:
                self.expect(TrainerEnded, timeout_s=max(0.0, min(100, until_s - time.monotonic())), slot=slot)
            except TimeoutError:
                if how == "park":
                    raise
                self.tell(Kill, [slot])
                self.expect(TrainerEnded, slot=slot)
        return start_s

    def wait_for_spare(self, slot: str) -> None:
        """Return when the slot has a spare trainer that is ready, if its trainers are such that it gets one."""
        if not self.config.compile:
            return
        self.num_spares[slot] += 1
        deadline_s = time.monotonic() + 60
        while self.host_log.read_text().count(f"spare trainer of {slot} is ready") < self.num_spares[slot]:
            if time.monotonic() > deadline_s:
                self.num_spares[slot] -= 1
                report(way="no spare trainer", slot=slot)
                return
            self.read()

    def measure(self, way: str, slots: list[str], start_s: float, last_step: int = 0) -> int:
        """Form a world; report the seconds from `start_s` to its first step; return the last step seen."""
        left_s = time.monotonic()
        self.messages.clear()
        self.attempt += 1
        self.tell(Join, slots)
        ready = {slot: self.expect(Ready, slot=slot) for slot in slots}
        before = set(self.pids.values())
        new = [slot for slot in slots if self.pids.get(slot) not in (None, ready[slot].pid)]
        self.pids |= {slot: message.pid for slot, message in ready.items()}
        ready_s = time.monotonic()
        store = {"store_host": ready[slots[0]].store_host, "store_port": ready[slots[0]].store_port}
        replica_servers = {NODE: self.replica_server} if self.replica_server else {}
        self.link.send(
            ReplicaServersTold(
                attempt=self.attempt, replica_servers=replica_servers, peer=None, mean_s_between_losses=600.0
            )
        )
        for rank, slot in enumerate(slots):
            place = {"rank": rank, "world_size": len(slots), "local_rank": rank, "local_world_size": len(slots)}
            self.tell(Go, [slot], **place, **store)
        restored = self.expect(Restored, slot=slots[0])
        restored_s = time.monotonic()
        first = self.expect(Stepped, slot=slots[0])
        first_s = time.monotonic()
        step = first.progress.step
        compiled = self.count_compiled()
        self.expect(Kept, slot=slots[0])
        kept_s = time.monotonic()
        usual = [self.expect(Stepped, slot=slots[0]) for _ in range(5)][-1]
        report(
            way=way,
            ranks=len(slots),
            seconds_to_first_step=round(first_s - start_s, 2),
            leave=round(left_s - start_s, 2),
            ready=round(ready_s - left_s, 2),
            load=round(restored_s - ready_s, 2),
            first_step=round(first_s - restored_s, 2),
            first_snapshot=round(kept_s - first_s, 2),
            resumed_from=restored.source,
            steps_redone=max(0, last_step - step + 1) if last_step else None,
            step=step,
            usual_step_s=round(usual.row["step_s"], 3),
            new_processes=len(new),
            compiled=sum(compiled[self.pids[slot]] for slot in slots),
            compiled_by_survivors=sum(compiled[self.pids[slot]] for slot in slots if self.pids[slot] in before),
            used_gib=get_used_gib(),
        )
        return usual.progress.step

    def count_compiled(self) -> "Counter[int]":
        """Return how many pieces of code each process has compiled since the last time."""
        before = self.num_compiled
        logs = "\n".join(path.read_text(errors="replace") for path in (self.folder / "trace").glob("*"))
        self.num_compiled = Counter(int(pid) for pid in re.findall(r'^V\S+ \S+ (\d+) .*"dynamo_start"', logs, re.M))
        return self.num_compiled - before

    def close(self) -> None:
        """End the host and all that hangs on it; return when it is gone."""
        self.link.send(End(reason="measured", forget=False))
        while self.link.receive() is not None:
            pass

    def read_logs(self) -> list[str]:
        """Return what the parts of each start took."""
        lines = [
            line
            for path in [self.host_log, *sorted((self.folder / "host").glob("*.log"))]
            for line in path.read_text().splitlines()
        ]
        return [line for line in lines if any(mark in line for mark in MARKS)]


def get_used_gib() -> float | None:
    """Return the memory of our GPUs that is in use, by anyone."""
    if not IS_GPU:
        return None
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={','.join(GPUS)}", *query]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return round(sum(map(int, lines)) / 1024, 1)


def build_config(folder: Path, *, num_ranks: int, is_shared: bool, compiles: bool) -> RunConfig:
    """Prepare text in the folder; return what is trained on it: the large model, or the small one on a shared GPU."""
    lines = [json.dumps({"text": f"In the beginning was the word {n}. " * 8}) for n in range(20_000 if IS_GPU else 500)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=300, val_fraction=0.05)
    return RunConfig(
        run="r",
        storage=str(folder / "runs"),
        model=SMALL if is_shared else MODEL,
        precision="bf16" if IS_GPU else "fp32",
        compile=compiles,
        data=DataConfig(path=str(folder / "data"), seq_len=(512 if is_shared else 4096) if IS_GPU else 64),
        train=TrainConfig(steps=100_000, global_batch=8 if is_shared else 4, micro_batch=2, eval_samples=4),
        checkpoint=CheckpointConfig(every_steps=100_000, memory_every_steps=10),
        fault=FaultConfig(collective_timeout_s=120),
        cluster=ClusterConfig(max_workers=num_ranks),
        wandb=WandbConfig(mode="disabled"),
    )


def change(coordinator: Coordinator, way: str, how: str, before: list[str], after: list[str]) -> None:
    """Let one change happen; what goes wrong is told, and the next one is tried all the same."""
    try:
        start_s = coordinator.end(how, before)
        steps = [
            said.progress.step for slot, said in coordinator.messages if isinstance(said, Stepped) and slot == before[0]
        ]
        coordinator.measure(way, after, start_s, max(steps, default=0))
    except TimeoutError as error:
        report(way=way, failed=str(error)[-1800:])
        for slot in {*before, *after}:
            coordinator.link.send(Kill(slot=Slot(NODE, slot), attempt=coordinator.attempt))
        time.sleep(1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=int, default=0, help="trainers on one GPU")
    parser.add_argument("--compile", action="store_true", help="on a CPU, too")
    parser.add_argument("--rounds", type=int, default=2, help="of all changes")
    args = parser.parse_args()
    share: int = args.share
    folder = Path(tempfile.mkdtemp(prefix="r-"))
    slots = [f"gpu{index}" for index in range(share or NUM_SLOTS)]
    config = build_config(folder, num_ranks=len(slots), is_shared=bool(share), compiles=IS_GPU or args.compile)
    start_s = time.monotonic()
    coordinator = Coordinator(folder, config, slots=slots, share=share)
    report(way="host warm, trainers rehearsed", seconds=round(time.monotonic() - start_s, 2))
    try:
        coordinator.measure("first world", slots, time.monotonic())
        if len(slots) > 1:
            one = slots[:1]
            for _ in range(args.rounds):
                change(coordinator, "told to leave, same world", "leave", slots, slots)
                change(coordinator, "one trainer killed -9", "kill", slots, slots)
                change(coordinator, "parked, shrink", "park", slots, one)
                change(coordinator, "parked, grow", "park", one, slots)
            change(coordinator, "parked, shrink", "park", slots, one)
            slots = one
        for _ in range(args.rounds):
            change(coordinator, "told to leave, same world", "leave", slots, slots)
            change(coordinator, "the trainer killed -9", "kill", slots, slots)
        print("\n".join(coordinator.read_logs()), flush=True)
        coordinator.close()
        start_s = time.monotonic()
        cold = subprocess.Popen([sys.executable, "-c", COLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        cold.stdin.write(json.dumps(asdict(config)))
        cold.stdin.close()
        for line in cold.stdout:
            if line.startswith("stepped"):
                break
        report(
            way="new process from scratch, compiled code cached",
            seconds_to_first_step=round(time.monotonic() - start_s, 2),
        )
        cold.kill()
        cold.wait()
    finally:
        coordinator.raylet.kill()  # which ends a host that is still there
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
