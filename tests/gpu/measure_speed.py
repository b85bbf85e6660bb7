"""Measure steps on one GPU beside the peers', in one go; needs torch alone (no Ray, no W&B).

    PYTHONPATH=. python tests/gpu/measure_speed.py [--peers DIR] [--limit-s 540] [--repeats 2] [--only WORD ...]

DIR holds `titan_bench.py`. Prints one line `RESULT {json}` per case as it goes, peers and ours in turn, each in a
process of its own; leaves out what would not fit into the limit. TRY_ON_CPU=1 runs tiny shapes, to see that
it works at all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.ports import WorldSpec
from elastic.training.metrics import get_memory_gib
from elastic.training.step import build_trainable, train_step
from elastic.world import World, close_world, open_world

TRY_ON_CPU = bool(os.environ.get("TRY_ON_CPU"))
H100_BF16_FLOPS = 989.4e12
TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=128, tied_head=False)
LARGE = {"tied_head": False, "rope_theta": 500_000.0, "vocab_size": 128256, "num_kv_heads": 8, "ffn_dim": 8192}
SHAPES = {  # the peer's: model, sequences, their length
    "1.5B": (ModelConfig(dim=2048, num_layers=16, num_heads=32, **LARGE), 4, 4096),
    "1.5B, 1 sequence": (ModelConfig(dim=2048, num_layers=16, num_heads=32, **LARGE), 1, 4096),
    "3B": (ModelConfig(dim=3072, num_layers=28, num_heads=24, **LARGE), 2, 8192),
    "125M": (
        ModelConfig(
            **{**LARGE, "num_kv_heads": 12, "ffn_dim": 2048, "vocab_size": 50304}, dim=768, num_layers=12, num_heads=12
        ),
        8,
        1024,
    ),
    "demo": (ModelConfig(), 32, 256),
}
if TRY_ON_CPU:
    SHAPES = dict.fromkeys(SHAPES, (TINY, 2, 32))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    name: str
    shape: str
    config: dict[str, Any] = field(default_factory=dict)
    peer: tuple[str, ...] | None = None
    """Arguments of titan_bench.py; run in turn with ours."""
    text: bool = False
    """Train on text that can be learned, and tell the loss."""
    steps: int = 14


CASES = (
    Case(name="none", shape="1.5B", peer=("--ac", "none")),
    Case(name="none", shape="125M", peer=("--size", "125M", "--bs", "8", "--seq", "1024"), steps=40),
    Case(name="selective", shape="1.5B", config={"recompute": "selective"}, peer=("--ac", "selective")),
    Case(name="full", shape="1.5B", config={"recompute": "full"}, peer=("--ac", "full")),
    Case(name="none", shape="3B", peer=("--size", "3B", "--bs", "2", "--seq", "8192"), steps=11),
    Case(name="fp8", shape="3B", config={"precision": "fp8"}, steps=11),
    Case(
        name="fp8 rowwise",
        shape="3B",
        config={"precision": "fp8_rowwise"},
        peer=("--size", "3B", "--bs", "2", "--seq", "8192", "--fp8", "rowwise"),
    ),
    *(
        Case(name=f"budget {share}", shape="1.5B", config={"recompute": "budget", "recompute_budget": share})
        for share in (0.8, 0.6, 0.3, 0.1)
    ),
    *(
        Case(name=precision, shape="1.5B, 1 sequence", config={"precision": precision})
        for precision in ("fp32", "tf32", "bf16", "fp8")
    ),
    *(
        Case(name=precision, shape="demo", config={"precision": precision}, text=True, steps=200)
        for precision in ("fp32", "tf32", "bf16", "fp8")
    ),
    Case(name="fp8", shape="1.5B", config={"precision": "fp8"}),
    Case(name="fsdp2", shape="1.5B", config={"strategy": "fsdp2"}),
    Case(name="no graph", shape="125M", config={"cuda_graph": "off"}, steps=40),
    Case(name="cudnn", shape="1.5B", config={"attention": "cudnn"}),
    Case(name="cudnn", shape="125M", config={"attention": "cudnn"}, steps=40),
    Case(name="fa4", shape="125M", config={"attention": "fa4"}, steps=40),
)


def report(**row: Any) -> None:
    print("RESULT", json.dumps(row), flush=True)


def draw_text(samples: int, seq_len: int) -> torch.Tensor:
    """Return text over 16 symbols in which the last two decide among four successors: 1.06 nats, if all is learned."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(16, (16, 16, 4), generator=generator)
    chances = torch.tensor([0.6, 0.2, 0.15, 0.05])
    choices = torch.multinomial(chances, samples * (seq_len + 1), replacement=True, generator=generator)
    choices = choices.reshape(samples, -1)
    rows = [torch.randint(16, (samples,), generator=generator) for _ in range(2)]
    for index in range(seq_len - 1):
        rows.append(successors[rows[-2], rows[-1], choices[:, index]])
    return torch.stack(rows, dim=1)


def measure(case: Case, world: World) -> dict[str, Any]:
    model, batch, seq_len = SHAPES[case.shape]
    options = {"strategy": "auto", "precision": "bf16", "compile": True} | case.config
    config = RunConfig(
        model=model,
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(global_batch=batch, micro_batch=batch),
        **options,
    )
    is_cuda = world.device.type == "cuda"
    start_s = time.monotonic()
    trainable = build_trainable(config, world)
    build_s = time.monotonic() - start_s
    num_rows = batch * case.steps if case.text else batch
    ids = torch.randint(model.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    rows = (draw_text(num_rows, seq_len) if case.text else ids).to(world.device).split(batch)
    times_s, losses = list[float](), list[float]()
    for index in range(case.steps):
        row = rows[index % len(rows)]
        microbatch = (row[:, :-1].contiguous(), row[:, 1:].contiguous())
        if is_cuda:
            torch.cuda.synchronize()
        begin_s = time.perf_counter()
        step = train_step(trainable, [microbatch], lr=2e-3 if case.text else 1e-4, max_grad_norm=1.0, world=world)
        if is_cuda:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - begin_s)
        losses.append(step.loss)
        if is_cuda and index == 3:
            torch.cuda.reset_peak_memory_stats()
    step_s = statistics.median(times_s[min(5, case.steps - 1) :])
    tokens_per_s = batch * seq_len / step_s
    kinds = {module.kind for module in trainable.spread.computing.modules() if hasattr(module, "kind")}
    return {
        "step_ms": round(step_s * 1e3, 2),
        "tok_s": round(tokens_per_s),
        "mfu": round(tokens_per_s * model.flops_per_token(seq_len) / H100_BF16_FLOPS, 4),
        "mem_gib": round(get_memory_gib(world.device), 2),
        "build_s": round(build_s, 1),
        "first_s": round(times_s[0], 1),
        "worst_ms": round(max(times_s[min(5, case.steps - 1) :]) * 1e3, 2),
        "attention": kinds.pop(),
        "loss": [losses[0], statistics.fmean(losses[-20:]) if case.text else losses[-1]],
    }


def run_ours(case: Case, repeat: int) -> None:
    """Run a case in a child of this process, which has imported all that is needed and has not touched the GPU."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    what = {"who": "solvent", "shape": case.shape, "case": case.name, "repeat": repeat}
    try:
        place = WorldSpec(
            rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="127.0.0.1", store_port=0
        )
        world = open_world(place, device="cpu" if TRY_ON_CPU else "cuda", timeout_s=60.0, store=dist.HashStore())
        report(**what, **measure(case, world))
        close_world(world)
    except Exception as error:
        report(**what, error=repr(error)[:500])
        traceback.print_exc(limit=-4)
    finally:
        sys.stdout.flush()
        os._exit(0)


def run_peer(case: Case, repeat: int, folder: str, left_s: float) -> None:
    command = [sys.executable, f"{folder}/titan_bench.py", *(case.peer or ()), "--steps", str(case.steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left_s), check=False)
    except subprocess.TimeoutExpired:
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    row = json.loads(lines[-1][7:]) if lines else {"error": done.stderr[-600:]}
    report(**{"who": "torchtitan", "shape": case.shape, "case": case.name, "repeat": repeat} | row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers")
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="<shape>/<case>")
    parser.add_argument("--attention", help="instead of what is fastest, for all cases that do not say")
    parser.add_argument("--steps", type=int, help="instead of the case's; 14 or more to be comparable")
    args = parser.parse_args()
    end_s = time.monotonic() + args.limit_s
    for repeat in range(args.repeats):
        for case in CASES:
            if args.only and f"{case.shape}/{case.name}" not in args.only:
                continue
            if args.attention:
                case = replace(case, config={"attention": args.attention} | case.config)  # noqa: PLW2901
            if args.steps:
                case = replace(case, steps=args.steps)  # noqa: PLW2901
            if repeat and not case.peer:
                continue
            if time.monotonic() > end_s - 15:
                report(shape=case.shape, case=case.name, repeat=repeat, left_out="time limit")
                continue
            if case.peer and args.peers:
                run_peer(case, repeat, args.peers, end_s - time.monotonic())
            run_ours(case, repeat)


if __name__ == "__main__":
    main()
