"""Measure precision and recomputation on one GPU; needs torch alone (no Ray, no W&B).

    PYTHONPATH=. python tests/gpu/measure_techniques.py

Prints one line `RESULT {json}` per case, as it goes, and leaves out what would not fit into TIME_LIMIT_S.
With TRY_ON_CPU=1 it runs the same code on a tiny shape, to see that it works at all.
"""

import gc
import json
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from elastic.config import RunConfig
from elastic.models.llama import Config as ModelConfig
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.world import World, close_world, open_world

TIME_LIMIT_S = 330.0
H100_BF16_FLOPS = 989.4e12
"""Dense, SXM. Source: https://www.nvidia.com/en-us/data-center/h100/ (halved from the figure with sparsity)."""

TRY_ON_CPU = bool(os.environ.get("TRY_ON_CPU"))
SMALL = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=128)
DEMO = replace(SMALL, vocab_size=64) if TRY_ON_CPU else ModelConfig()
LARGE = (
    SMALL
    if TRY_ON_CPU
    else ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=32768)
)
LARGE_BATCH, LARGE_SEQ = (2, 32) if TRY_ON_CPU else (4, 4096)
DEMO_STEPS, DEMO_BATCH, DEMO_SEQ = (60, 8, 32) if TRY_ON_CPU else (200, 32, 256)

START_S = time.monotonic()


def report(**row: Any) -> None:
    print("RESULT", json.dumps(row), flush=True)


def markov_text(samples: int, seq_len: int, device: torch.device) -> torch.Tensor:
    """Text over 16 symbols in which the last two decide among four successors: 1.06 nats, if all is learned."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(16, (16, 16, 4), generator=generator).to(device)
    choices = torch.multinomial(
        torch.tensor([0.6, 0.2, 0.15, 0.05]), samples * (seq_len + 1), replacement=True, generator=generator
    )
    choices = choices.reshape(samples, -1).to(device)
    rows = [torch.randint(16, (samples,), generator=generator).to(device) for _ in range(2)]
    for index in range(seq_len - 1):
        rows.append(successors[rows[-2], rows[-1], choices[:, index]])
    return torch.stack(rows, dim=1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget(device: torch.device) -> None:
    """Give memory back and drop compiled code, so that cases do not touch each other."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_precision(world: World, text: torch.Tensor, *, strategy: str, precision: Any) -> float:
    config = RunConfig(model=DEMO, strategy=strategy, precision=precision)
    trainable = build_trainable(config, world)
    losses, skipped, start_s = [], 0, time.monotonic()
    for rows in text.split(DEMO_BATCH):
        batch = (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        step = train_step(trainable, [batch], lr=2e-3, max_grad_norm=1.0, world=world)
        losses.append(step.loss)
        skipped += step.verdict != "good"
    final = statistics.fmean(losses[-20:])
    report(
        case="precision",
        strategy=strategy,
        precision=precision,
        steps=len(losses),
        first_loss=losses[0],
        final_loss=final,
        skipped=skipped,
        wall_s=time.monotonic() - start_s,
    )
    return final


def measure_speed(world: World, *, strategy: str, recompute: Any, compiled: bool, cudnn: bool) -> None:
    case = {"strategy": strategy, "recompute": recompute, "compile": compiled, "attention": "cudnn" if cudnn else ""}
    if time.monotonic() - START_S > TIME_LIMIT_S:
        report(case="speed", **case, left_out="time limit")
        return
    forget(world.device)
    attention = "auto" if TRY_ON_CPU else "cudnn" if cudnn else "flash"
    config = RunConfig(
        model=LARGE, strategy=strategy, precision="bf16", recompute=recompute, compile=compiled, attention=attention
    )
    ids = torch.randint(LARGE.vocab_size, (LARGE_BATCH, LARGE_SEQ + 1), generator=torch.Generator().manual_seed(0)).to(
        world.device
    )
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    try:
        start_s = time.monotonic()
        trainable = build_trainable(config, world)
        times_ms, losses = [], []
        for index in range(13):
            synchronize(world.device)
            begin_s = time.monotonic()
            step = train_step(trainable, [batch], lr=1e-4, max_grad_norm=1.0, world=world)
            synchronize(world.device)
            times_ms.append((time.monotonic() - begin_s) * 1e3)
            losses.append(step.loss)
            if index == 0:
                first_step_s = time.monotonic() - start_s
    except torch.OutOfMemoryError:
        report(case="speed", **case, out_of_memory=True)
        return
    step_ms = statistics.median(times_ms[3:])
    tokens_per_s = batch[0].numel() / step_ms * 1e3
    report(
        case="speed",
        **case,
        step_ms=round(step_ms, 2),
        tokens_per_s=round(tokens_per_s),
        mfu=round(tokens_per_s * LARGE.flops_per_token(LARGE_SEQ) / H100_BF16_FLOPS, 4),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if world.device.type == "cuda" else None,
        build_and_first_step_s=round(first_step_s, 1),
        losses=[losses[0], losses[-1]],
    )


def main() -> None:
    place = WorldSpec(
        rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="127.0.0.1", store_port=0
    )
    world = open_world(place, device="cpu" if TRY_ON_CPU else "cuda", timeout_s=60.0, store=dist.HashStore())
    report(
        case="machine",
        torch=torch.__version__,
        device=str(world.device) if TRY_ON_CPU else torch.cuda.get_device_name(),
        demo_params=DEMO.num_params,
        large_params=LARGE.num_params,
    )
    text = markov_text(DEMO_STEPS * DEMO_BATCH, DEMO_SEQ + 1, world.device)
    for strategy in ("single", "fsdp2"):
        finals = {
            precision: measure_precision(world, text, strategy=strategy, precision=precision)
            for precision in ("fp32", "bf16", "fp16")
        }
        worst = max(abs(final / finals["fp32"] - 1) for final in finals.values())
        report(case="precision_check", strategy=strategy, worst_difference=worst, within_1_percent=worst < 0.01)
    for compiled in (True, False):
        for recompute in ("none", "selective", "full"):
            measure_speed(world, strategy="fsdp2", recompute=recompute, compiled=compiled, cudnn=False)
    for strategy, cudnn in (("fsdp2", True), ("single", False), ("ddp", False)):
        measure_speed(world, strategy=strategy, recompute="none", compiled=True, cudnn=cudnn)
    close_world(world)


if __name__ == "__main__":
    main()
