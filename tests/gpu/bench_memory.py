"""Measure what configurations hold of one GPU, beside what the planner says; needs torch alone (no Ray, no W&B).

    python -m tests.gpu.bench_memory [--limit-s 235] [--only WORD ...]

Three sizes, precisions, recomputation, strategies and accumulation, each in a process of its own: a few steps, the
second half of them counted. Prints a line `RESULT {json}` per case, peak GiB and milliseconds of a step each predicted
and measured. The planner's memory may be 8 % off, and 3 % below. TRY_ON_CPU=1 runs tiny shapes, to see that it works.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from cluster.catalog.gpus import get_spec
from cluster.planner.memory import estimate_memory, split_batch
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.world import World, close_world, open_world

TRY_ON_CPU = bool(os.environ.get("TRY_ON_CPU"))
TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=128, tied_head=False)
LARGE = {"tied_head": False, "rope_theta": 500_000.0, "vocab_size": 128256, "num_kv_heads": 8, "ffn_dim": 8192}
SMALL = {"tied_head": False, "vocab_size": 50304, "num_kv_heads": 12, "ffn_dim": 2048}
MODELS = {
    "125M": ModelConfig(dim=768, num_layers=12, num_heads=12, **SMALL),
    "1.5B": ModelConfig(dim=2048, num_layers=16, num_heads=32, **LARGE),
    "3B": ModelConfig(dim=3072, num_layers=28, num_heads=24, **LARGE),
}
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    model: str
    batch: int
    """Samples of a microbatch."""
    seq_len: int
    config: dict[str, Any] = field(default_factory=dict)
    num_microbatches: int = 1

    @property
    def name(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.config.items())
        return f"{self.model} {self.num_microbatches}x{self.batch}x{self.seq_len} {options}".strip()


CASES = (  # the most telling first: what does not fit into the limit is left out
    Case(model="1.5B", batch=4, seq_len=4096),
    Case(model="1.5B", batch=4, seq_len=4096, config={"recompute": "selective"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"recompute": "full"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"strategy": "fsdp2"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"strategy": "fsdp2", "recompute": "selective"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"strategy": "fsdp2", "compile": False}),
    Case(model="1.5B", batch=1, seq_len=4096, config={"precision": "fp32"}),
    Case(model="3B", batch=2, seq_len=8192),
    Case(model="3B", batch=2, seq_len=8192, config={"strategy": "fsdp2", "recompute": "full"}),
    Case(model="3B", batch=1, seq_len=8192, config={"strategy": "fsdp2"}, num_microbatches=2),
    Case(model="125M", batch=8, seq_len=1024),
    Case(model="125M", batch=32, seq_len=1024, config={"strategy": "fsdp2"}),
    Case(model="125M", batch=32, seq_len=1024, config={"strategy": "ddp"}),
    Case(model="1.5B", batch=4, seq_len=4096, num_microbatches=2),
    Case(model="1.5B", batch=2, seq_len=4096, config={"strategy": "ddp"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"compile": False}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"recompute": "budget", "recompute_budget": 0.5}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"strategy": "fsdp2", "recompute": "full", "compile": False}),
    Case(model="1.5B", batch=1, seq_len=16384),
    Case(model="1.5B", batch=4, seq_len=4096, config={"precision": "fp8"}),
    Case(model="1.5B", batch=4, seq_len=4096, config={"precision": "fp8", "strategy": "fsdp2"}),
    Case(model="1.5B", batch=8, seq_len=4096, config={"recompute": "full"}),
    Case(model="1.5B", batch=1, seq_len=4096, config={"precision": "tf32", "strategy": "fsdp2"}),
    Case(model="1.5B", batch=2, seq_len=4096, config={"precision": "fp16"}),
)


def report(**row: Any) -> None:
    print("RESULT", json.dumps(row), flush=True)


def build_config(case: Case) -> RunConfig:
    batch = case.batch * case.num_microbatches
    options = {"precision": "bf16", "compile": True} | case.config
    if not TRY_ON_CPU and options["precision"] not in ("fp32", "tf32"):
        options["attention"] = "cudnn"  # the same in all: which one is fastest takes seconds to find
    return RunConfig(
        model=TINY if TRY_ON_CPU else MODELS[case.model],
        data=DataConfig(seq_len=32 if TRY_ON_CPU else case.seq_len),
        train=TrainConfig(global_batch=batch, micro_batch=case.batch),
        **options,
    )


def predict(config: RunConfig, gpu: str | None) -> dict[str, Any]:
    memory = estimate_memory(config, world_size=1)
    row: dict[str, Any] = {"predicted_gib": round(memory.shown_gib, 2), "needs_gib": round(memory.peak_gib, 2)}
    if gpu is not None:
        from cluster.planner.throughput import estimate_step

        row["predicted_ms"] = round(1e3 * estimate_step(config, get_spec(gpu), world_size=1).step_s, 1)
    return row


def measure(config: RunConfig, world: World) -> dict[str, Any]:
    is_cuda = world.device.type == "cuda"
    trainable = build_trainable(config, world)
    micro_batch, num_microbatches = split_batch(config, 1)
    shape = (micro_batch * num_microbatches, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    rows = ids.to(world.device).split(micro_batch)
    microbatches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    times_s = list[float]()
    for index in range(STEPS):
        if is_cuda:
            torch.cuda.synchronize()
            if index == STEPS // 2:
                torch.cuda.reset_peak_memory_stats()
        begin_s = time.perf_counter()
        train_step(trainable, microbatches, lr=1e-4, max_grad_norm=1.0, world=world)
        if is_cuda:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - begin_s)
    row = {"step_ms": round(1e3 * statistics.median(times_s[STEPS // 2 :]), 1), "first_s": round(times_s[0], 1)}
    if is_cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.memory_reserved() / 2**30, 2)
        row["total_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 2)
        free, total = torch.cuda.mem_get_info()
        row["beside_gib"] = round((total - free) / 2**30 - row["reserved_gib"], 2)
    return row


def run(case: Case, gpu: str | None) -> None:
    """Run a case in a child of this process, which has imported all that is needed and has not touched the GPU."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        config = build_config(case)
        place = WorldSpec(
            rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="127.0.0.1", store_port=0
        )
        world = open_world(place, device="cpu" if TRY_ON_CPU else "cuda", timeout_s=60.0, store=dist.HashStore())
        row = predict(config, gpu) | measure(config, world)
        if "peak_gib" in row:
            row["error"] = round(row["predicted_gib"] / row["peak_gib"] - 1, 4)
        if "predicted_ms" in row:
            row["error_ms"] = round(row["predicted_ms"] / row["step_ms"] - 1, 4)
        report(case=case.name, **row)
        close_world(world)
    except Exception as error:
        report(case=case.name, failed=repr(error)[:300])
        traceback.print_exc(limit=-4)
    finally:
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit-s", type=float, default=235.0)
    parser.add_argument("--only", nargs="*", help="words that a case's name must have, all of them")
    parser.add_argument("--gpu", help="its name in cluster/catalog/gpus.py", default="H200")
    args = parser.parse_args()
    end_s = time.monotonic() + args.limit_s
    for case in CASES:
        if args.only and not all(word in case.name for word in args.only):
            continue
        if time.monotonic() > end_s - 12:
            report(case=case.name, left_out="time limit")
            continue
        run(case, args.gpu)


if __name__ == "__main__":
    main()
