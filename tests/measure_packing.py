"""Loss on equal data: packed documents beside the same documents unpacked, and beside the stream.

    python -m tests.measure_packing [--steps 100]

Each step of the packed run takes the rows of the loader; the unpacked run takes the documents of these rows, each in a
row of its own, filled up with ignored labels. Both start from the same weights. The third run trains on the stream at
the same number of rows. At the end all three are judged by the same validation documents, unpacked.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.data.corpus import open_corpus
from elastic.data.loader import Loader, eval_batches
from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from elastic.models.llama import Config as ModelConfig
from elastic.nn.loss import IGNORE
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, eval_loss, train_step
from elastic.world import close_world, open_world

SEQ_LEN = 256


def unpack(tokens_BS, labels_BS, borders_N):
    """Return a row for each document of these."""
    tokens, labels, rows = tokens_BS.flatten(), labels_BS.flatten(), []
    for start, end in pairwise(borders_N.tolist()):
        if end > start and (labels[start:end] != IGNORE).any():
            row = torch.zeros(2, SEQ_LEN, dtype=torch.int64)
            row[1] = IGNORE
            row[:, : end - start] = torch.stack([tokens[start:end], labels[start:end]])
            rows.append(row)
    return torch.stack(rows, dim=1).unbind()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    place = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host="", store_port=0)
    world = open_world(place, device="cpu", timeout_s=60, store=dist.HashStore())
    device = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    with tempfile.TemporaryDirectory(prefix="packing-") as temporary:
        folder = Path(temporary)
        texts = [text[at : at + 300] for text in read_chapters() for at in range(0, len(text), 300)]
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([folder / "a.jsonl"], folder / "data", vocab_size=2048)
        packed = RunConfig(
            model=ModelConfig(dim=128, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=384, vocab_size=2048),
            data=DataConfig(path=str(folder / "data"), seq_len=SEQ_LEN, packing="documents"),
            train=TrainConfig(steps=args.steps, global_batch=16, micro_batch=16, eval_samples=64),
        )
        stream = replace(packed, data=replace(packed.data, packing="stream"))
        losses = {"packed": [], "unpacked": [], "stream": []}
        trained = {name: build_trainable(stream if name == "stream" else packed, world) for name in losses}
        options = {"lr": 2e-3, "max_grad_norm": 1.0, "world": world}
        with (
            Loader(open_corpus(packed), start_step=0, **device) as rows,
            Loader(open_corpus(stream), start_step=0, **device) as pieces,
        ):
            for (_, batch), (_, piece) in zip(rows, pieces, strict=True):
                (microbatch,) = batch.microbatches
                for name, part in (
                    ("packed", microbatch),
                    ("unpacked", unpack(*microbatch)),
                    ("stream", piece.microbatches[0]),
                ):
                    losses[name].append(train_step(trained[name], [part], **options).loss)
        held_out = [
            unpack(*part) for batch in eval_batches(open_corpus(packed), **device) for part in batch.microbatches
        ]
        print(f"{len(texts):,} documents; {open_corpus(packed).plan_epochs()[0]}")
        worst = max(abs(a - b) / b for a, b in zip(losses["packed"], losses["unpacked"], strict=True))
        print(f"packed against unpacked, {args.steps} steps: losses differ by {worst:.1e} of themselves at most")
        for name, one in trained.items():
            print(f"{name:10} last loss {losses[name][-1]:.4f}, validation {eval_loss(one, held_out, world):.4f}")
        trained.clear()
    close_world(world)


if __name__ == "__main__":
    main()
