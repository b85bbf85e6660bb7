"""The loop that users run, started in the processes of `_ranks` with everything in view."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    FaultConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from elastic.data.preparation.prepare import prepare
from elastic.models.llama import Config as ModelConfig
from elastic.ports import Outcome, WorldSpec
from elastic.records.fencing import take_generation
from elastic.storage import open_storage
from elastic.training.run import train
from tests.distributed._ranks import spec

SEQ_LEN, BATCH = 16, 7


def write_data(folder: Path) -> Path:
    """Prepare a text that is easy to learn."""
    lines = [json.dumps({"text": f"In the beginning was the word {n}. " * 4}) for n in range(200)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=300, val_fraction=0.3)
    return folder / "data"


def make_config(folder: Path, run: str, *, steps: int, every_steps: int = 50, **fault: Any) -> RunConfig:
    return RunConfig(
        run=run,
        storage=str(folder / "runs"),
        device="cpu",
        model=ModelConfig(dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=64, vocab_size=300, init_std=0.1),
        data=DataConfig(path=str(folder / "data"), seq_len=SEQ_LEN, record_samples=True),
        train=TrainConfig(steps=steps, global_batch=BATCH, micro_batch=2, eval_samples=8),
        optim=OptimConfig(lr=2e-2),
        checkpoint=CheckpointConfig(every_steps=every_steps),
        cluster=ClusterConfig(max_workers=3),
        fault=FaultConfig(**fault),
        wandb=WandbConfig(mode="disabled"),
    )


class Watcher:
    """Keeps the rows of a rank; tells the test of each."""

    def __init__(self, on_row: Callable[[list[dict[str, Any]]], None] = lambda rows: None):
        self.rows: list[dict[str, Any]] = []
        self._on_row = on_row

    def stepped(self, progress, row):
        self.rows.append(dict(row))
        self._on_row(self.rows)

    def phase(self, phase, start_s, end_s): ...

    def restored(self, progress, source): ...

    def committed(self, progress): ...

    def kept(self, progress, *, copied): ...

    def alive(self): ...

    def stalled(self, stall): ...


class NoNotices:
    def get_notice(self):
        return None


def lead_and_train(config: RunConfig, place: WorldSpec, **how: Any) -> Outcome:
    """Train one rank of a run that is led: rank 0 takes the generation first, as every command does."""
    if place.rank == 0:
        take_generation(open_storage(f"{config.storage}/{config.run}"), place.attempt, who="a test")
    return train(config, place, **how)


def train_rank(
    config: RunConfig, rank: int, port: int, *, world_size: int, attempt: int, watcher=None, notices=None
) -> tuple[Outcome, list[dict[str, Any]]] | None:
    """Return how one rank of a world ended, and its rows; None for a rank that the world lacks."""
    if rank >= world_size:
        return None
    watcher = watcher or Watcher()
    place = spec(rank, port, world_size=world_size, attempt=attempt)
    outcome = lead_and_train(config, place, notices=notices or NoNotices(), observer=watcher, open_sinks=list)
    return outcome, watcher.rows
