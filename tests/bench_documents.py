"""What it costs to keep documents apart: steps of packed rows beside steps of the stream, equal in shape.

    python -m tests.bench_documents [--shape 1.5b] [--rounds 20]

Both train on rows of equal length, in turn, a step each, with weights of their own. Documents are as long as those of
web text (log-normal, median 545 tokens, mean 900), packed as `data.packing=documents` does.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.data.loader import join_borders
from elastic.data.packing import pack
from elastic.models.llama import Config as ModelConfig
from elastic.nn.loss import IGNORE
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, train_step
from elastic.world import close_world, open_world

TINY = ModelConfig(dim=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=768)
SMALL = ModelConfig(dim=768, num_layers=12, num_heads=12, num_kv_heads=12, ffn_dim=2048, vocab_size=50304)
LARGE = replace(TINY, dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=128256)
SHAPES = {"tiny": (TINY, 2, 1024), "125m": (SMALL, 8, 1024), "1.5b": (replace(LARGE, tied_head=False), 4, 4096)}


def draw_rows(num_rows, seq_len, *, seed):
    """Return where documents begin in each of so many packed rows, and how much of them is padding."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(6.3, 1.0, 4 * num_rows + 400).astype(int), 8, None)
    rest = lengths % seq_len
    pieces = np.concatenate([np.full((lengths // seq_len).sum(), seq_len), rest[rest > 0]])
    rows = pack(pieces, seq_len)
    sizes = [[int(pieces[index]) for index in row] for row in rows]
    chosen = random.permutation(len(rows))[:num_rows]
    starts = [np.cumsum([0, *sizes[row]])[: len(sizes[row]) + (sum(sizes[row]) < seq_len)] for row in chosen]
    padding = 1 - sum(sum(sizes[row]) for row in chosen) / (num_rows * seq_len)
    return [start.astype(np.int32) for start in starts], padding


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch, seq_len = SHAPES[args.shape]
    plain = RunConfig(
        model=model,
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(global_batch=batch, micro_batch=batch),
        precision="bf16" if device.type == "cuda" else "fp32",
        compile=device.type == "cuda",
        strategy="single",
        device=device.type,
    )
    packed = replace(plain, data=replace(plain.data, packing="documents"))
    place = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="", store_port=0)
    world = open_world(place, device=device.type, timeout_s=60, store=dist.HashStore())
    trainables = {"stream": build_trainable(plain, world), "documents": build_trainable(packed, world)}
    times_s, num_documents, paddings = {name: [] for name in trainables}, [], []
    for step in range(args.rounds + 5):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(model.vocab_size, (batch, seq_len + 1), generator=generator)
        starts, padding = draw_rows(batch, seq_len, seed=step)
        num_documents.append(sum(map(len, starts)))
        paddings.append(padding)
        pair = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        pair[1][:, 0] = IGNORE
        borders = torch.from_numpy(join_borders(starts, batch, seq_len)[0])
        for name, microbatch in (("stream", pair), ("documents", (*pair, borders))):
            on_device = tuple(part.to(device) for part in microbatch)
            start_s = time.perf_counter()
            train_step(trainables[name], [on_device], lr=1e-4, max_grad_norm=1.0, world=world)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times_s[name].append(time.perf_counter() - start_s)
    medians_ms = {name: 1000 * statistics.median(times[5:]) for name, times in times_s.items()}
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "shape": f"{args.shape}: {batch} x {seq_len}",
        "step_ms": {name: round(ms, 2) for name, ms in medians_ms.items()},
        "documents_over_stream": round(medians_ms["documents"] / medians_ms["stream"], 3),
        "documents_per_row": round(statistics.mean(num_documents) / batch, 2),
        "padding": round(statistics.mean(paddings), 4),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    trainables.clear()
    close_world(world)


if __name__ == "__main__":
    main()
