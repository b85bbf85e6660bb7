"""Try a model: let a checkpoint of a run answer prompts.

The checkpoint is exported into a folder for temporary files, adapters merged, and run through transformers. A model
with a chat template gets the prompt as a user's turn, others go on from it.
"""

import argparse
import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.cli import _checkpoint_export
from cluster.cli._runs import add_json, add_run, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a run and prompts."""
    add_run(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="may be given several times")
    parser.add_argument("--step", metavar="N", type=int, help="default: the newest checkpoint")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=128, help="of an answer (default %(default)s)")
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.0, help="0: the likeliest token each time (default)"
    )
    parser.add_argument("--raw", action="store_true", help="go on from the prompt as it is, without a chat template")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and answer in a process of its own, which may use torch."""
    with TemporaryDirectory(prefix="solvent-generate-") as folder:
        out = str(Path(folder) / "model")
        how = {"to": "hf", "dtype": "fp32", "max_shard_gib": 4.0, "tokenizer": None, "json": True}
        told = StringIO()
        with redirect_stdout(told):
            _checkpoint_export.run(argparse.Namespace(run_name=args.run_name, out=out, step=args.step, **how))
        command = [sys.executable, "-m", "elastic.generate", out, "--max-tokens", str(args.max_tokens)]
        command += ["--temperature", str(args.temperature), *(["--raw"] if args.raw else [])]
        for prompt in args.prompt:
            command += [f"--prompt={prompt}"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    rows = json.loads(done.stdout.splitlines()[-1])
    if args.json:
        print_json({"run": args.run_name, "step": json.loads(told.getvalue())["step"], "answers": rows})
        return 0
    for row in rows:
        print(f"> {row['prompt']}\n{row['answer']}\n")
    return 0
