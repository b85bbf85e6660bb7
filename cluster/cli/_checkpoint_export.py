"""Write a checkpoint's model as a folder that transformers loads, with config.json and tokenizer.

Weights only: the optimizer's state stays in the run.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._runs import add_json, add_run, open_run, print_json
from elastic.errors import DataError, StorageError

if TYPE_CHECKING:
    from elastic.checkpoint.hf.exporting import TokenizerFiles
    from elastic.checkpoint.layout import CommittedCheckpoint
    from elastic.storage import Storage

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a run and a folder."""
    add_run(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or s3://, gs://, az://")
    parser.add_argument("--to", choices=("hf",), default="hf", help="the format (default %(default)s)")
    parser.add_argument("--step", metavar="N", type=int, help="default: the newest checkpoint")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default %(default)s, as trained")
    parser.add_argument(
        "--max-shard-gib", metavar="X", type=float, default=4.0, help="of one file (default %(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder of `solvent prepare`; default: the run's own")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export and tell what was written."""
    from elastic.checkpoint.hf.exporting import write_folder
    from elastic.checkpoint.hf.saved import SavedWeights
    from elastic.checkpoint.layout import read_manifest
    from elastic.checkpoint.storage import GIB, explain
    from elastic.config import ModelConfig
    from elastic.storage import open_storage

    start_s = time.monotonic()
    storage = open_run(args.run_name)
    checkpoint = _find_checkpoint(storage, args.step)
    manifest = read_manifest(storage, checkpoint)
    model = {key.removeprefix("model."): value for key, value in manifest.config.items() if key.startswith("model.")}
    tokenizer = _find_tokenizer(storage, args.tokenizer or manifest.config["data.path"])
    out = open_storage(args.out)
    try:
        exported = write_folder(
            out,
            ModelConfig(**model),
            SavedWeights(storage, checkpoint, manifest),
            tokenizer=tokenizer,
            seq_len=manifest.config["data.seq_len"],
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gib * GIB),
        )
    except OSError as error:
        raise explain(error, out.url) from error
    summary = {
        "path": args.out,
        "run": storage.url,
        "step": checkpoint.step,
        "model_type": exported.model_type,
        "num_bytes": exported.num_bytes,
        "files": list(exported.files),
        "seconds": time.monotonic() - start_s,
    }
    if args.json:
        print_json(summary)
    else:
        print(
            f"step {checkpoint.step} of {storage.url} is in {args.out} as {exported.model_type}: "
            f"{exported.num_bytes / GIB:.3f} GiB in {summary['seconds']:.1f} s. Load it with "
            f"AutoModelForCausalLM.from_pretrained({args.out!r}) of transformers."
        )
    return 0


def _find_checkpoint(storage: "Storage", step: int | None) -> "CommittedCheckpoint":
    from elastic.checkpoint.layout import list_committed

    committed = {checkpoint.step: checkpoint for checkpoint in list_committed(storage)}
    if not committed:
        raise StorageError(f"RUN={storage.url} has no finished checkpoint. Train it until one is written.")
    if step is not None and step not in committed:
        raise StorageError(
            f"--step={step}: {storage.url} has no finished checkpoint of that step. Use one of: "
            f"{', '.join(map(str, committed))}."
        )
    return committed[max(committed) if step is None else step]


def _find_tokenizer(storage: "Storage", prepared: str) -> "TokenizerFiles":
    """Return the files that the run was imported with, else those of its data."""
    from elastic.checkpoint.hf.exporting import TokenizerFiles
    from elastic.checkpoint.hf.importing import KEPT
    from elastic.data.hf_tokenizer import read_tokenizer

    kept = {key.removeprefix(KEPT): storage.read(key) for key in storage.list(KEPT)}
    if any(name.startswith("tokenizer") for name in kept):
        config: Mapping[str, Any] = json.loads(kept.pop("config.json"))
        return TokenizerFiles(files=kept, token_ids={name: config.get(name) for name in _TOKEN_IDS})
    try:
        own = read_tokenizer(Path(prepared))
    except FileNotFoundError:
        raise DataError(
            f"data.path={prepared!r} of the run is not here, and a model is of no use without its tokenizer. Name the "
            "folder that `solvent prepare` wrote with --tokenizer DIR."
        ) from None
    return TokenizerFiles(files=own.files, token_ids={**dict.fromkeys(_TOKEN_IDS), "eos_token_id": own.eot_id})
