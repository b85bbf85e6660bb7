"""`solvent prepare` beside the loop that others tokenize with, on the same text, tokenizer and cores, in turn.

    python -m tests.bench_prepare [--mib 64] [--processes 2] [--rounds 3]

The peer is the plain way of Megatron-LM's `preprocess_data.py`: a pool of processes that each take JSON lines, encode
the text of each with Hugging Face's tokenizers, append the end-of-text token, and a writer that appends what comes
back to a file of 16-bit numbers. A second one is nanochat's: one process gives batches of texts to the tokenizer's own
threads. Neither hashes, counts, holds out or verifies anything, as `prepare` does.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare

_own = {}


def start(path):
    _own["tokenizer"] = Tokenizer.from_file(path)
    _own["end"] = _own["tokenizer"].token_to_id("<|endoftext|>")


def encode(line):
    ids = _own["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    return np.array([*ids, _own["end"]], np.uint16)


def run_megatron_like(source, tokenizer, out, processes):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    num_tokens = 0
    pool = Pool(processes, initializer=start, initargs=(str(tokenizer),))
    with pool, source.open() as lines, out.open("wb") as file:
        for ids in pool.imap(encode, lines, chunksize=32):
            file.write(ids.tobytes())
            num_tokens += len(ids)
    return num_tokens


def run_nanochat_like(source, tokenizer, out, _processes):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    start(str(tokenizer))
    num_tokens, batch = 0, []

    def flush(file):
        nonlocal num_tokens
        for encoded in _own["tokenizer"].encode_batch(batch, add_special_tokens=False):
            ids = np.array([*encoded.ids, _own["end"]], np.uint16)
            file.write(ids.tobytes())
            num_tokens += len(ids)
        batch.clear()

    with source.open() as lines, out.open("wb") as file:
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1024:
                flush(file)
        flush(file)
    return num_tokens


def run_prepare(source, tokenizer, out, processes):
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    info = prepare([source], out, tokenizer=tokenizer, num_processes=processes, overwrite=True)
    return info.train.num_tokens + info.val.num_tokens


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ways = {
        "solvent prepare": run_prepare,
        "as Megatron-LM's preprocess_data.py": run_megatron_like,
        "as nanochat's": run_nanochat_like,
    }
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder, chapters = Path(name), read_chapters()
        prepare(["kjv:"], folder / "own", vocab_size=8192)
        source, number = folder / "a.jsonl", 0
        with source.open("w") as file:
            while file.tell() < args.mib * 2**20:
                text = f"{number} {chapters[number % len(chapters)]}"
                file.write(json.dumps({"text": text}) + "\n")
                number += 1
        rates = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                begin_s = time.perf_counter()
                num_tokens = run(source, folder / "own" / "tokenizer.json", folder / f"out-{len(way)}", args.processes)
                rates[way].append(num_tokens / (time.perf_counter() - begin_s))
                shutil.rmtree(folder / "out-15", ignore_errors=True)
        print(
            f"{args.mib} MiB of JSON lines, {num_tokens:,} tokens, {args.processes} processes, {os.cpu_count()} cores"
        )
        for way, of_way in rates.items():
            print(f"{way:40} {statistics.median(of_way) / 1e6:6.2f} M tokens/s (of {len(of_way)} rounds, the median)")


if __name__ == "__main__":
    main()
