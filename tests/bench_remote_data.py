"""Training data in an object store: from a bare node to its first batch, and what steps wait for once warm.

    python -m tests.bench_remote_data [--gib 2] [--server moto|files]

Makes a prepared set of random tokens in shards of 16 MiB and serves it as S3: from moto, which answers some 100
requests a second, or straight from files by a small server of its own, which reads with sendfile. A process of its own
opens the set with an empty cache, and takes steps of a fixed length from then on. Of packed documents, it is told how
many rows they make, as a run keeps that after its first start.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import torch

from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.data.packing import parse_index
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.format import BLOCK_BYTES, read_info, write_block_sums, write_info, write_shard

SHARD_TOKENS = 1 << 23
SEQ_LEN = 4096


def make_set(folder, gib):
    """Write a prepared folder of so many GiB."""
    (folder / "a.txt").write_text("text " * 999)
    data = folder / "bucket" / "data"
    prepare([folder / "a.txt"], data, vocab_size=300, val_fraction=0)
    info, random = read_info(data), np.random.default_rng(0)
    shards, num_documents = [], 0
    for index in range(round(gib * 2**30 / (2 * SHARD_TOKENS))):
        tokens = random.integers(1, 300, SHARD_TOKENS).astype(np.uint16)
        ends = np.unique(np.append(random.integers(2, SHARD_TOKENS, SHARD_TOKENS // 700), SHARD_TOKENS))
        tokens[ends - 1] = info.eot_id
        num_documents += len(ends)
        shards.append(write_shard(data / f"train-{index:05d}.arrow", tokens, np.array([0, *ends], np.int32)))
    num_tokens = SHARD_TOKENS * len(shards)
    train = replace(info.train, num_tokens=num_tokens, num_documents=num_documents, shards=tuple(shards))
    info = replace(info, train=train, largest_id=299)
    write_block_sums(data, info)
    write_info(data, info)
    return data


class Files(BaseHTTPRequestHandler):
    """Answers what our client asks an S3 of: a range of an object, and the list of a folder."""

    protocol_version, root = "HTTP/1.1", Path()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if "list-type" in query:
            names = sorted(each.name for each in (self.root / "bucket" / "data").iterdir())
            found = "".join(
                f"<Contents><Key>data/{name}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>1</Size>"
                f"<ETag>x</ETag></Contents>"
                for name in names
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        with (self.root / path.strip("/")).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.flush()
            while first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)

    def log_message(self, *_):
        pass


def serve_files(root, port):
    Files.root = root

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Files) as server:
        port.value = server.server_address[1]
        server.serve_forever()


def serve_moto(root, port):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    number = server.get_host_and_port()[1]
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{number}", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for path in (root / "bucket" / "data").iterdir():
        client.upload_file(str(path), "bucket", f"data/{path.name}")
    port.value = number
    time.sleep(10**6)


def measure(url, cache, packing, step_s, rows):
    """Be the node: print what it took."""
    begin_s = time.perf_counter()
    from elastic.data.corpus import open_corpus
    from elastic.data.loader import Loader

    data = DataConfig(path=url, seq_len=SEQ_LEN, packing=packing, cache=cache, cache_gib=1.0)
    corpus = open_corpus(RunConfig(data=data, train=TrainConfig(steps=200, global_batch=rows, micro_batch=rows)))
    folder = corpus.sources[""].folder
    index = Path(cache).with_suffix(".index")
    if packing == "documents":
        if not index.exists():
            print(f"how documents are packed was found out in {find_index(corpus, index):.1f} s", flush=True)
        corpus.train.sources[0].index = parse_index(index.read_bytes())
    imported_s = time.perf_counter() - begin_s
    with Loader(corpus, rank=0, world_size=1, device=torch.device("cpu"), start_step=0) as loader:
        next(loader)
        first_s, waits_s = time.perf_counter() - begin_s, []
        first_bytes = folder.num_bytes_fetched
        for _ in range(150):
            time.sleep(step_s)
            start_s = time.perf_counter()
            next(loader)
            waits_s.append(time.perf_counter() - start_s)
        end_s, taken = time.perf_counter(), folder.num_bytes_fetched - first_bytes
    warm = waits_s[40:]
    used = sum(path.stat().st_blocks * 512 for path in Path(cache).iterdir())
    result = {
        "packing": packing,
        "opened_s": round(imported_s, 2),
        "first_batch_s": round(first_s, 2),
        "bytes_until_then_mib": round(first_bytes / 2**20, 1),
        "mib_per_s_afterwards": round(taken / 2**20 / (end_s - begin_s - first_s), 1),
        "waits_ms_once_warm": {"median": round(1000 * statistics.median(warm), 2), "worst": round(1000 * max(warm), 1)},
        "cache_mib": round(used / 2**20, 1),
    }
    print(json.dumps(result), flush=True)


def find_index(corpus, path):
    begin_s = time.perf_counter()
    path.write_bytes(corpus.train.sources[0].get_index().dump())
    return time.perf_counter() - begin_s


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--server", choices=("moto", "files"), default="moto")
    parser.add_argument("--step-s", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--node", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.node:
        measure(*args.node, args.step_s, args.rows)
        return
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    os.environ.update(environment)
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as name:
        root = Path(name)
        make_set(root, args.gib)
        context = multiprocessing.get_context("fork")
        port = context.Value("i", 0)
        server = context.Process(target=serve_moto if args.server == "moto" else serve_files, args=(root, port))
        server.start()
        while not port.value:
            time.sleep(0.1)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port.value}"
        print(f"{args.gib:g} GiB from {args.server}, blocks of {BLOCK_BYTES >> 10} KiB, {args.rows} rows a step")
        for packing in ("stream", "documents"):
            own = [f"--step-s={args.step_s}", f"--rows={args.rows}", "--node", "s3://bucket/data"]
            command = [sys.executable, "-m", "tests.bench_remote_data", *own, str(root / packing), packing]
            subprocess.run(command, check=True)
            if packing == "documents":  # the next node
                shutil.rmtree(root / packing)
                subprocess.run(command, check=True)
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
