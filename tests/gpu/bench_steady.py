"""What elasticity costs a GPU while nothing happens: the same training under a host and without, in turn.

    python -m tests.gpu.bench_steady [--turns N] [--steps N] [--compile]

Without: `torchrun -m elastic`, a rank per GPU. With: a real host with its replica server, trainers, heartbeats, spares
and snapshots in memory, as many as are planned where a node is lost every ten minutes; this script plays the
coordinator, as in `bench_restart`, whose model is trained. Neither saves to the storage meanwhile. A step lasts from
its row to the next row, so that what snapshots hold up counts, and so does the mean, which a few long steps would move.
Prints lines `RESULT {json}`, the last with the medians of the turns' ratios. Needs neither Ray nor W&B.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from cluster.runtime.messages import Kept, Stepped
from elastic import config_load
from elastic.config import RunConfig
from elastic.records.rundir import RunDir, parse_utc, read_rows
from tests.gpu.bench_restart import GPUS, IS_GPU, NUM_SLOTS, ROOT, Coordinator, build_config, report

WARM_UP_STEPS = 30


def summarize(rows: list[dict]) -> dict:
    """Return milliseconds of a step."""
    steps_ms = [1e3 * (b - a) for a, b in pairwise(parse_utc(row["time_utc"]) for row in rows)]
    return {
        "steps": len(steps_ms),
        "median_ms": round(median(steps_ms), 2),
        "mean_ms": round(mean(steps_ms), 2),
        "longest_ms": round(max(steps_ms), 1),
        "row_step_ms": round(1e3 * median(row["step_s"] for row in rows), 2),
        "last_loss": rows[-1]["loss"],
    }


def train_without(folder: Path, config: RunConfig, *, steps: int) -> dict:
    """Train under torchrun."""
    config = replace(config, train=replace(config.train, steps=WARM_UP_STEPS + steps + 1))
    path = folder / "config.yaml"
    path.write_text(config_load.dump(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_SLOTS), "-m", "elastic"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([*launch, path], check=True, stdout=subprocess.DEVNULL, env=env, cwd=ROOT)
    rows = list(read_rows(RunDir(Path(config.storage) / config.run).metrics))
    return summarize(rows[WARM_UP_STEPS:-1])  # the last one evaluates


def train_with(folder: Path, config: RunConfig, *, steps: int) -> dict:
    """Train under a host; count once every trainer has its spare, which makes itself ready on the same GPU."""
    slots = [f"gpu{index}" for index in range(NUM_SLOTS)]
    coordinator = Coordinator(folder, config, slots=slots, share=0)
    try:
        coordinator.measure("with: first world", slots, time.monotonic())
        for slot in slots:
            coordinator.wait_for_spare(slot)
        coordinator.messages.clear()
        rows, num_kept = [], 0
        while len(rows) < steps:
            coordinator.read()
            rows += [m.row for slot, m in coordinator.messages if isinstance(m, Stepped) and slot == slots[0]]
            num_kept += sum(isinstance(m, Kept) and m.copied for _, m in coordinator.messages)
            coordinator.messages.clear()
        coordinator.close()
    finally:
        coordinator.raylet.kill()
    return {**summarize(rows), "snapshots": num_kept}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--compile", action="store_true", help="on a CPU, too")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="s-"))
    ways = {"without": train_without, "with": train_with}
    turns = []
    try:
        config = build_config(folder, num_ranks=NUM_SLOTS, is_shared=False, compiles=IS_GPU or args.compile)
        config = replace(config, checkpoint=replace(config.checkpoint, memory_every_steps=0))
        for number in range(args.turns):
            turn = {}
            for way in ways if number % 2 == 0 else reversed(ways):  # a machine that slows down favours neither
                own = folder / f"{way}-{number}"
                own.mkdir()
                turn[way] = ways[way](own, replace(config, storage=str(own / "runs")), steps=args.steps)
                report(way=way, **turn[way])
                shutil.rmtree(own)
            turns.append(turn)
        ratios = {
            f"{key}_ratio": round(median(turn["with"][key] / turn["without"][key] for turn in turns), 4)
            for key in ("median_ms", "mean_ms", "row_step_ms")
        }
        report(ranks=NUM_SLOTS, gpus=GPUS if IS_GPU else None, turns=len(turns), **ratios)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
