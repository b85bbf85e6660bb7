"""Try a model: let a checkpoint of a run answer prompts.

The checkpoint is exported into a folder for temporary files, adapters merged, and run through transformers. A model
with a chat template gets the prompt as a user's turn, others go on from it. With --follow it answers from each new
checkpoint while the run trains, and keeps what was said in `answers/` of the run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.cli import _checkpoint_export
from cluster.cli._runs import add_json, add_run, open_run, print_json
from elastic.errors import ConfigError, SolventError
from elastic.strict_json import dump_json

ANSWERS = "answers/"
"""Below this key of a run lies what was answered from its checkpoints, a file a step."""


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
    parser.add_argument(
        "--follow", action="store_true", help="answer from each new checkpoint until the last; kept in RUN/answers"
    )
    parser.add_argument(
        "--poll-s", metavar="S", type=float, default=15.0, help="between two looks (default %(default)s)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Answer from one checkpoint, or from each new one."""
    if args.follow and args.step is not None:
        raise ConfigError(
            f"--step={args.step} names one checkpoint, and --follow answers from each new one. Leave one out."
        )
    if args.follow:
        return _follow(args)
    answered = _answer(args, args.step)
    if isinstance(answered, int):
        return answered
    _tell(args, answered)
    return 0


def _answer(args: argparse.Namespace, step: int | None) -> dict[str, Any] | int:
    """Export, and answer in a process of its own, which may use torch; return its exit code if it fails."""
    with TemporaryDirectory(prefix="solvent-generate-") as folder:
        out = str(Path(folder) / "model")
        how = {"to": "hf", "dtype": "fp32", "max_shard_gib": 4.0, "tokenizer": None, "json": True}
        told = StringIO()
        with redirect_stdout(told):
            _checkpoint_export.run(argparse.Namespace(run_name=args.run_name, out=out, step=step, **how))
        command = [sys.executable, "-m", "elastic.generate", out, "--max-tokens", str(args.max_tokens)]
        command += ["--temperature", str(args.temperature), *(["--raw"] if args.raw else [])]
        for prompt in args.prompt:
            command += [f"--prompt={prompt}"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    rows = json.loads(done.stdout.splitlines()[-1])
    return {"run": args.run_name, "step": json.loads(told.getvalue())["step"], "answers": rows}


def _tell(args: argparse.Namespace, answered: Mapping[str, Any]) -> None:
    if args.json:
        print_json(answered)
        return
    for row in answered["answers"]:
        print(f"> {row['prompt']}\n{row['answer']}\n")


def _follow(args: argparse.Namespace) -> int:
    """Answer from each new checkpoint until the run has made its last step; older ones than the newest are left out.

    Beside the run, not in it: no rank waits for an answer, and none depends on how many there are.
    """
    from elastic.checkpoint.format.manifest import list_committed, read_manifest

    storage, last_step = open_run(args.run_name), -1
    while True:
        committed = list_committed(storage)
        if committed and committed[-1].step > last_step:
            checkpoint = committed[-1]
            try:
                num_steps = int(read_manifest(storage, checkpoint).config["train.steps"])
                answered = _answer(args, checkpoint.step)
            except (OSError, SolventError):
                if list_committed(storage)[-1:] == [checkpoint]:
                    raise
                continue  # a newer one has taken its place meanwhile
            if isinstance(answered, int):
                return answered
            last_step = checkpoint.step
            storage.write(f"{ANSWERS}step-{last_step:08d}.json", [dump_json(answered, indent=1).encode()])
            if not args.json:
                print(f"step {last_step} of {num_steps}")
            _tell(args, answered)
            sys.stdout.flush()
            if last_step >= num_steps:
                return 0
        time.sleep(args.poll_s)
