"""A model small enough for a loop of real steps, and batches for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.nn.loss import IGNORE
from elastic.training.step import StepResult, Trainable, train_step
from elastic.world import World

SEQ_LEN = 12
MODEL = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=61)
CONFIG = RunConfig(model=MODEL, data=DataConfig(seq_len=SEQ_LEN), train=TrainConfig(global_batch=7, micro_batch=2))


def with_model(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, model=replace(config.model, **changes))


def global_batch(step: int, *, samples: int = 7) -> tuple[Tensor, Tensor]:
    """Text with something to learn: each token is a fixed function of the one before, with some noise."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(61, (samples,), generator=generator)]
    for _ in range(SEQ_LEN):
        noise = torch.randint(3, (samples,), generator=generator)
        rows.append((rows[-1] * 7 + 3 + noise) % 61)
    text = torch.stack(rows, dim=1)
    labels = text[:, 1:].clone()
    labels[:, 0] = IGNORE
    return text[:, :-1].contiguous(), labels


def rank_microbatches(batch: tuple[Tensor, Tensor], world: World, *, micro: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Cut a global batch for one rank; rows that are missing for an even cut are added with ignored labels."""
    tokens, labels = batch
    chunk = micro * world.world_size
    missing = -len(tokens) % chunk
    tokens = torch.cat((tokens, torch.zeros(missing, SEQ_LEN, dtype=torch.int64)))
    labels = torch.cat((labels, torch.full((missing, SEQ_LEN), IGNORE)))
    mine = slice(world.rank * len(tokens) // world.world_size, (world.rank + 1) * len(tokens) // world.world_size)
    return list(zip(tokens[mine].split(micro), labels[mine].split(micro), strict=True))


def train(trainable: Trainable, world: World, *, steps: int, lr: float = 3e-3) -> list[StepResult]:
    return [
        train_step(trainable, rank_microbatches(global_batch(step), world), lr=lr, max_grad_norm=1.0, world=world)
        for step in range(steps)
    ]


def full_weights(trainable: Trainable) -> dict[str, Any]:
    """The whole weights on rank 0 (nothing on the others), as plain arrays that can cross a queue."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: tensor.clone().numpy() for name, tensor in get_model_state_dict(trainable.model, options=options).items()
    }
