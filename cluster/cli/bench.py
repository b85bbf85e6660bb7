"""Measure this machine's ceilings, and how much of them a training step uses.

Matrix products, copies and storage are measured alone; then the step of CONFIG (else a small model) on one device with
random tokens, for each of the microbatches and sequence lengths given.
"""

import argparse
import sys

from cluster.cli._runs import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration, and what to vary."""
    parser.add_argument("config", metavar="CONFIG", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[], metavar="N", help="samples per step")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[], metavar="N", help="tokens per sample")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure (default: %(default)s)")
    parser.add_argument("--storage", default=".", help="folder to write and read a file in (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure in a process of its own, which may use torch, and return its exit code."""
    import subprocess

    config = [args.config] if args.config else []
    options = ["--steps", str(args.steps), "--storage", args.storage, *(["--json"] if args.json else [])]
    for name, values in (("--micro-batches", args.micro_batches), ("--seq-lens", args.seq_lens)):
        options += [name, *map(str, values)] if values else []
    command = [sys.executable, "-m", "elastic.bench", *config, *args.overrides, *options]
    return subprocess.run(command, check=False).returncode
