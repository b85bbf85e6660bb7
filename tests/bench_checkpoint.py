"""What saving costs training: ours beside torch.distributed.checkpoint, one after the other in one process per rank.

    python -m tests.bench_checkpoint                           # one GPU, 1.5 B parameters, 16.8 GiB of state
    torchrun --nproc-per-node 3 -m tests.bench_checkpoint      # CPU, a small model

Ours takes a snapshot every `EVERY` steps, the first one included, and writes to the disk as often as that takes it.
Some steps without saves and as many with them take turns, because other work on the machine comes and goes: the ratio
is the median of those of the turns, and that of CPU seconds (of rank 0 without its replica server) is shown beside it,
and the median of the worst steps of the turns beside the worst of all. The others save once each. Every step ends when
the device has done it. Prints a line `RESULT {json}` per way.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.checkpoint.train_state import get_live_state
from elastic.config import CheckpointConfig, RunConfig
from elastic.models.llama import Config as ModelConfig
from elastic.ports import Progress, WorldSpec
from elastic.storage import open_storage
from elastic.training.step import build_trainable, train_step
from elastic.world import close_world, get_device, open_world

EVERY = 20
TURN = 2 * EVERY
GIB = 2**30
LARGE = ModelConfig(
    dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=128256, tied_head=False
)
SMALL = ModelConfig(dim=256, num_layers=4, num_heads=4, num_kv_heads=4, ffn_dim=768, vocab_size=4096)


class Bench:
    """One rank with a model to train."""

    def __init__(self, folder: Path, *, num_turns: int) -> None:
        is_gpu = torch.cuda.is_available()
        self.folder = folder
        self.steps = num_turns * TURN
        self.config = RunConfig(
            model=LARGE if is_gpu else SMALL,
            precision="bf16" if is_gpu else "fp32",
            compile=is_gpu,
            checkpoint=CheckpointConfig(every_steps=EVERY, memory_every_steps=EVERY, keep_last=1),
        )
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        spec = WorldSpec(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            attempt=1,
            store_host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            store_port=int(os.environ.get("MASTER_PORT", "0")),
        )
        self.device = get_device("auto", local_rank=rank)
        store = dist.HashStore() if world_size == 1 else None
        self.world = open_world(spec, device="auto", timeout_s=300, store=store)
        self.trainable = build_trainable(self.config, self.world)
        batch, seq_len = (4, 4096) if is_gpu else (4, 128)
        tokens_BS = torch.randint(self.config.model.vocab_size, (batch, seq_len + 1), device=self.device)
        self.batch = (tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous())

    def run(
        self,
        num_steps: int,
        *,
        before_update: Callable[[], None],
        after: Callable[[int], None],
        first_step: int = 1,
    ) -> list[float]:
        """Return the seconds of each step, all that `after` does included."""
        took_s = []
        for step in range(first_step, first_step + num_steps):
            start_s = time.perf_counter()
            train_step(
                self.trainable,
                [self.batch],
                lr=1e-5,
                max_grad_norm=1.0,
                world=self.world,
                before_update=before_update,
            )
            after(step)
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # not of the stream that copies to the host
            took_s.append(time.perf_counter() - start_s)
        return took_s

    def get_state(self) -> dict:
        model, optimizer = get_state_dict(self.trainable.model, self.trainable.optimizer)
        return {"model": model, "optimizer": optimizer}

    def remove(self, name: str) -> None:
        """Remove a folder once no rank needs it any more."""
        if self.world.world_size > 1:
            dist.barrier()
        if self.world.rank == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.world.world_size > 1:
            dist.barrier()

    def report(self, way: str, took_s: list[float], base_s: float | None, **more: object) -> None:
        if self.world.rank == 0:
            median_s, worst_s = statistics.median(took_s), max(took_s)
            base_s = base_s or median_s
            row = {
                "way": way,
                "median_ms": round(1000 * median_s, 1),
                "worst_ms": round(1000 * worst_s, 1),
                "median_ratio": round(median_s / base_s, 3),
                "worst_ratio": round(worst_s / base_s, 3),
                **more,
            }
            print("RESULT", json.dumps(row), flush=True)


def nothing(*_: object) -> None:
    """Do nothing."""


def find_usual_worst(turns_s: list[list[float]], base_s: float) -> float:
    """Return the median of the worst steps of the turns, in steps of the usual length."""
    return round(statistics.median(map(max, turns_s)) / base_s, 3)


def bench_ours(bench: Bench) -> float:
    """Save to memory every few steps, and to the disk as often as that takes it; return the seconds of other steps."""
    bench.remove("ours")  # of an earlier bench that was cut short
    storage = open_storage(str(bench.folder / "ours"))
    server = start_replica_server(node="bench", ip="127.0.0.1", secret="bench")
    memory = Memory(server.open_connection(), node="bench", secret="bench")
    durable: list[int] = []
    kept_s: list[float] = []
    """What each snapshot took until training heard that it was safe."""
    model, optimizer = bench.trainable.model, bench.trainable.optimizer

    def on_kept(progress: Progress, *, copied: bool) -> None:
        if copied:
            kept_s.append(round(time.perf_counter() - started_s[progress.step], 2))

    checkpointer = Checkpointer(
        storage,
        bench.config,
        device=bench.device,
        generation=1,
        memory=memory,
        on_committed=lambda progress: durable.append(progress.step),
        on_kept=on_kept,
    )
    checkpointer.plan_ahead(get_live_state(model, optimizer), optimizer)  # as in a run that was restored

    started_s: dict[int, float] = {}
    calls_ms: list[float] = []

    def after(step: int) -> None:
        due = checkpointer.get_due(step)
        if due:
            start_s = time.perf_counter()
            if checkpointer.start_save(model, optimizer, progress=Progress(step=step), extra={}, tier=due):
                started_s[step] = start_s
                calls_ms.append(round(1000 * (time.perf_counter() - start_s), 1))
        else:
            checkpointer.poll()

    without_s, with_s, ratios, cpu_ratios = [], [], [], []
    for first_step in range(EVERY // 2, bench.steps, TURN):  # saves are in the middle, so that their cost is in it too
        cpu_s = [time.process_time()]
        without_s.append(bench.run(TURN, before_update=nothing, after=nothing))
        cpu_s.append(time.process_time())
        with_s.append(bench.run(TURN, before_update=checkpointer.wait_staged, after=after, first_step=first_step))
        checkpointer.finish("memory")
        checkpointer.finish()
        cpu_s.append(time.process_time())
        ratios.append(statistics.median(with_s[-1]) / statistics.median(without_s[-1]))
        cpu_ratios.append((cpu_s[2] - cpu_s[1]) / (cpu_s[1] - cpu_s[0]))
    manifest = read_manifest(storage, list_committed(storage)[-1])
    held_bytes = memory._client.fetch_held_bytes()
    first = EVERY // 2
    base, took_s = list(chain(*without_s)), list(chain(*with_s))
    base_s = statistics.median(base)
    around_saves_s = [took_s[step - first : step - first + 3] for step in started_s]
    bench.report("no saves", base, base_s, worst_of_turns_ratio=find_usual_worst(without_s, base_s))
    bench.report(
        "solvent",
        took_s,
        base_s,
        median_ratio=round(statistics.median(ratios), 3),
        worst_of_turns_ratio=find_usual_worst(with_s, base_s),
        cpu_ratio=round(statistics.median(cpu_ratios), 3),
        first_ms=round(1000 * took_s[0], 1),
        snapshots=len(kept_s),
        durable_saves=len(durable),
        seconds_to_durable=round(checkpointer.forecast.get_usual_s("storage") or 0, 2),
        seconds_to_memory=round(checkpointer.forecast.get_usual_s("memory") or 0, 2),
        each_to_memory_s=kept_s,
        calls_ms=calls_ms,
        around_saves_ms=[[round(1000 * s, 1) for s in steps_s] for steps_s in around_saves_s],
        worst_around_saves_ratio=round(max(chain(*around_saves_s)) / base_s, 3),
        state_gib=round(sum(file.size_bytes for file in manifest.files.values()) / GIB, 3),
        snapshot_memory_gib=round(held_bytes / GIB, 3),
        host_peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        five_worst=sorted(((round(1000 * s, 1), first + i) for i, s in enumerate(took_s)), reverse=True)[:5],
    )
    bench.remove("ours")
    checkpointer.close()
    server.close()
    return base_s


def bench_dcp(bench: Bench, base_s: float, way: str) -> None:
    """Save once with torch's own checkpoint."""
    futures: list = []
    group = dist.new_group(backend="gloo")

    def after(step: int) -> None:
        if step != 2:
            return
        path = bench.folder / way
        if way == "dcp.save":
            dcp.save(bench.get_state(), checkpoint_id=path)
        elif way == "dcp.async_save":
            futures.append(dcp.async_save(bench.get_state(), checkpoint_id=path, process_group=group))
        else:
            from torch.distributed.checkpoint.staging import DefaultStager

            futures.append(
                dcp.async_save(bench.get_state(), checkpoint_id=path, process_group=group, async_stager=DefaultStager())
            )

    def before_update() -> None:
        if futures and hasattr(futures[-1], "staging_completion"):
            futures[-1].staging_completion.result()

    start_s = time.perf_counter()
    took_s = bench.run(8, before_update=before_update, after=after)
    for future in futures:
        getattr(future, "upload_completion", future).result()
    bench.report(way, took_s, base_s, seconds_to_durable=round(time.perf_counter() - start_s, 2))
    bench.remove(way)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--ours", action="store_true", help="and no others")
    parser.add_argument("--turns", type=int, default=5, help=f"of {TURN} steps without and as many with saves")
    args = parser.parse_args()
    shared = args.folder or Path(os.environ.get("BENCH_FOLDER", tempfile.gettempdir()))
    folder = shared / f"bench-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    bench = Bench(folder, num_turns=args.turns)
    bench.run(10, before_update=nothing, after=nothing)
    base_s = bench_ours(bench)
    for way in ("dcp.save", "dcp.async_save", "dcp.async_save with its stager") if not args.ours else ():
        try:
            bench_dcp(bench, base_s, way)
        except Exception as error:
            print("RESULT", json.dumps({"way": way, "failed": repr(error)[:200]}), flush=True)
    close_world(bench.world)


if __name__ == "__main__":
    main()
