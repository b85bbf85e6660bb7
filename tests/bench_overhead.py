"""What our loop costs beyond the model: our training step beside a bare PyTorch loop of the same model, on a CPU.

    python -m tests.bench_overhead [--rounds 30]

Both train the same weights on the same data with the same optimizer, in turn, one step each. The bare loop is that of
PyTorch's tutorials: forward, cross-entropy, backward, clip, step. Ours is `train_step`, with the votes, sums and the
verdict of every step. CPU seconds of one thread are compared, so that other work on the machine counts little.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.nn.layers import init_weights
from elastic.nn.loss import IGNORE
from elastic.optim.adamw import AdamW
from elastic.plugins import load
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.world import close_world, open_store, open_world

CONFIG = RunConfig(
    device="cpu",
    strategy="auto",
    model=ModelConfig(),
    data=DataConfig(seq_len=256),
    train=TrainConfig(global_batch=4, micro_batch=4),
)


def build_bare(config):
    model = load("elastic.models", config.model.kind, key="model.kind").build(config.model)
    init_weights(model, seed=config.train.seed, std=config.model.init_std)
    return model, AdamW(model, config.optim)


def bare_step(model, optimizer, tokens, labels, *, lr):
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    store = open_store("127.0.0.1", timeout_s=10)
    place = WorldSpec(
        rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host=store.host, store_port=store.port
    )
    world = open_world(place, device="cpu", timeout_s=10, store=store)
    torch.set_num_threads(1)
    trainable = build_trainable(CONFIG, world)
    model, optimizer = build_bare(CONFIG)
    ours_s, bare_s, losses = [], [], []
    for step in range(args.rounds + 3):
        ids = torch.randint(4096, (4, 257), generator=torch.Generator().manual_seed(step))
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        start_s = time.process_time()
        ours = train_step(trainable, [(tokens, labels)], lr=1e-3, max_grad_norm=1.0, world=world).loss
        middle_s = time.process_time()
        bare = bare_step(model, optimizer, tokens, labels, lr=1e-3)
        end_s = time.process_time()
        ours_s.append(middle_s - start_s)
        bare_s.append(end_s - middle_s)
        losses.append(abs(ours - bare))
    del trainable
    close_world(world)
    ours_ms, bare_ms = (statistics.median(times[3:]) * 1e3 for times in (ours_s, bare_s))
    print(
        json.dumps(
            {
                "ours_ms": round(ours_ms, 1),
                "bare_ms": round(bare_ms, 1),
                "ratio": round(ours_ms / bare_ms, 4),
                "largest_difference_of_losses": max(losses),
            }
        )
    )


if __name__ == "__main__":
    main()
