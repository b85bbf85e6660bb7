"""What this machine can do at most, and how much of it a training step uses: `python -m elastic.bench`.

Ceilings are measured, not looked up: a data sheet knows neither the power limit nor the neighbours of a rented machine.
"""

import argparse
import dataclasses
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# torch.distributed re-exports its stores without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist

from elastic import config_load
from elastic.config import RunConfig
from elastic.direct import write_all
from elastic.errors import SolventError
from elastic.nn.precision import get_dtype
from elastic.ports import WorldSpec
from elastic.strict_json import dump_json
from elastic.training.metrics import get_memory_gib
from elastic.training.step import build_trainable, train_step
from elastic.world import World, close_world, open_world

_WARMUPS = 3
_STORAGE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that this machine does of one thing alone; 1 TFLOP/s = 1e12, 1 GB/s = 1e9."""

    device: str
    dtype: str
    products_tflops_per_s: float
    """A large square matrix product of random numbers."""
    copy_gb_per_s: float
    """Bytes read and written by a copy within the device's memory."""
    storage_write_gb_per_s: float
    """One file, until it is safe on the disk, past the page cache where the disk can do that: as a checkpoint."""
    storage_read_gb_per_s: float
    """The same file, from the disk where the system can be told to forget it."""


@dataclass(frozen=True, kw_only=True)
class StepRate:
    """How fast a shape trains, beside the ceilings."""

    micro_batch: int
    seq_len: int
    step_ms: float
    tokens_per_s: float
    tflops_per_s: float
    """Of the model, forward and backward, recomputation not counted."""
    share_of_products: float
    """Of the ceiling: 1 would be nothing but matrix products at full rate."""
    memory_gib: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, folder: Path) -> Ceilings:
    """Measure all ceilings in a few seconds."""
    is_cuda = device.type == "cuda"
    size = 8192 if is_cuda else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = _time(lambda: left @ right, device)
    source = torch.randn(2**28 if is_cuda else 2**24, device=device)  # several times any cache
    target = torch.empty_like(source)
    copy_s = _time(lambda: target.copy_(source), device)
    write_s, read_s = _time_storage(folder)
    return Ceilings(
        device=torch.cuda.get_device_name(device) if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        dtype=str(dtype).removeprefix("torch."),
        products_tflops_per_s=2 * size**3 / product_s / 1e12,
        copy_gb_per_s=2 * source.nbytes / copy_s / 1e9,
        storage_write_gb_per_s=_STORAGE_BYTES / write_s / 1e9,
        storage_read_gb_per_s=_STORAGE_BYTES / read_s / 1e9,
    )


def measure_step(config: RunConfig, world: World, ceilings: Ceilings, *, num_steps: int) -> StepRate:
    """Measure the training step of a configuration on random tokens; one microbatch a step.

    Raises:
        ConfigError: the device cannot do what the configuration asks for.
    """
    batch, seq_len = config.train.micro_batch, config.data.seq_len
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    trainable = build_trainable(config, world)
    ids = torch.randint(config.model.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(world.device)
    microbatch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> None:
        # lr=0: the same work, and weights that stay finite however long it takes
        train_step(trainable, [microbatch], lr=0.0, max_grad_norm=config.train.max_grad_norm, world=world)

    step_s = _time(step, world.device, repeats=num_steps)
    tokens_per_s = batch * seq_len / step_s
    tflops_per_s = tokens_per_s * config.flops_per_token / 1e12
    return StepRate(
        micro_batch=batch,
        seq_len=seq_len,
        step_ms=step_s * 1e3,
        tokens_per_s=tokens_per_s,
        tflops_per_s=tflops_per_s,
        share_of_products=tflops_per_s / ceilings.products_tflops_per_s,
        memory_gib=get_memory_gib(world.device),
    )


def vary(config: RunConfig, *, micro_batches: Sequence[int], seq_lens: Sequence[int]) -> Iterator[RunConfig]:
    """Yield the configuration with each microbatch and each length; its own where none is given."""
    for seq_len in seq_lens or [config.data.seq_len]:
        for micro_batch in micro_batches or [config.train.micro_batch]:
            yield replace(
                config,
                data=replace(config.data, seq_len=seq_len),
                train=replace(config.train, micro_batch=micro_batch, global_batch=micro_batch),
                cluster=replace(config.cluster, min_workers=1, max_workers=1),
            )


def _time(work: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Return the median seconds of some work, each waited for, after a few that do not count."""
    times_s: list[float] = []
    for _ in range(_WARMUPS + repeats):
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[_WARMUPS:])


def _time_storage(folder: Path) -> tuple[float, float]:
    """Return the seconds to write and to read a file of random bytes."""
    num_bytes = 16 * 2**20
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file, mmap.mmap(-1, num_bytes) as block:
        block.write(os.urandom(num_bytes))
        start_s = time.perf_counter()
        for _ in range(_STORAGE_BYTES // num_bytes):
            with memoryview(block) as data:
                write_all(file.fileno(), data)
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start_s
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start_s = time.perf_counter()
        while file.read(num_bytes):
            pass
        return write_s, time.perf_counter() - start_s


def _format(ceilings: Ceilings, rates: Sequence[StepRate]) -> str:
    lines = [
        f"{ceilings.device}, {ceilings.dtype}",
        f"  products  {ceilings.products_tflops_per_s:10.3g} TFLOP/s",
        f"  copy      {ceilings.copy_gb_per_s:10.1f} GB/s read and written",
        f"  storage   {ceilings.storage_write_gb_per_s:10.2f} GB/s written, {ceilings.storage_read_gb_per_s:.2f} read",
        "",
        "| micro_batch | seq_len | ms per step | tokens/s | TFLOP/s | of products | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [
            f"| {rate.micro_batch} | {rate.seq_len} | {rate.step_ms:.1f} | {rate.tokens_per_s:,.0f} "
            f"| {rate.tflops_per_s:.3g} | {rate.share_of_products:.1%} | {rate.memory_gib:.2f} |"
            for rate in rates
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m elastic.bench", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--storage", type=Path, default=Path())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        config = config_load.load(args.config, args.overrides) if args.config else RunConfig()
        configs = list(vary(config, micro_batches=args.micro_batches, seq_lens=args.seq_lens))
        place = WorldSpec(
            rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="127.0.0.1", store_port=0
        )
        world = open_world(place, device=config.device, timeout_s=60.0, store=dist.HashStore())
        ceilings = measure_ceilings(world.device, get_dtype(config.precision), args.storage)
        rates = [measure_step(each, world, ceilings, num_steps=args.steps) for each in configs]
        close_world(world)
    except SolventError as error:
        print(f"solvent: {error}", file=sys.stderr)  # noqa: T201 - a command
        return error.exit_code
    found = {"ceilings": dataclasses.asdict(ceilings), "steps": [dataclasses.asdict(rate) for rate in rates]}
    print(dump_json(found, indent=2) if args.json else _format(ceilings, rates))  # noqa: T201 - a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
