"""Write a checkpoint's model as a folder that transformers loads, with config.json and tokenizer.

Weights only: the optimizer's state stays in the run. Adapters (tune=lora, qlora) are merged into the weights that they
stand beside, or, with --to peft, written by themselves as PEFT loads them.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._checkpoint_ls import open_checkpoints
from cluster.cli._runs import add_json, add_run, print_json
from elastic.errors import CheckpointError, ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from elastic.checkpoint.format.manifest import CommittedCheckpoint, Manifest
    from elastic.checkpoint.hf.exporting import ExportDtype, Exported, TokenizerFiles, WeightSource
    from elastic.data.prepared.hf_tokenizer import HfTokenizer
    from elastic.storage import Storage

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a run and a folder."""
    add_run(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or s3://, gs://, az://")
    parser.add_argument(
        "--to", choices=("hf", "peft"), default="hf", help="a whole model, or adapters alone (default %(default)s)"
    )
    parser.add_argument("--step", metavar="N", type=int, help="default: the newest checkpoint")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default %(default)s, as trained")
    parser.add_argument(
        "--max-shard-gib", metavar="X", type=float, default=4.0, help="of one file (default %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="a folder of `solvent prepare`, for a run that has none; default: its own"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export and tell what was written."""
    from elastic.checkpoint.durable.storage_errors import GIB, explain
    from elastic.checkpoint.format.manifest import read_manifest
    from elastic.checkpoint.hf.exporting import write_folder
    from elastic.checkpoint.hf.saved import MergedWeights, SavedWeights, open_base
    from elastic.model_config import build_model_config
    from elastic.storage import open_storage
    from elastic.tuning import LoraConfig

    start_s = time.monotonic()
    storage, named_step = open_checkpoints(args.run_name)
    checkpoint = _find_checkpoint(storage, named_step if args.step is None else args.step)
    manifest = read_manifest(storage, checkpoint)
    model = build_model_config(**_get_section(manifest, "model"))
    tokenizer = _find_tokenizer(storage, manifest, args.tokenizer)
    out = open_storage(args.out)
    weights: WeightSource = SavedWeights(storage, checkpoint, manifest)
    try:
        if args.to == "peft":
            exported = _write_adapters(storage, manifest, weights, out=out, tokenizer=tokenizer, dtype=args.dtype)
        else:
            if manifest.config.get("tune", "full") != "full":
                base, _ = open_base(storage)
                weights = MergedWeights(base, weights, model, LoraConfig(**_get_section(manifest, "lora")))
            exported = write_folder(
                out,
                model,
                weights,
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
            + (
                f"PeftModel.from_pretrained(model, {args.out!r}) of PEFT."
                if args.to == "peft"
                else f"AutoModelForCausalLM.from_pretrained({args.out!r}) of transformers."
            )
        )
    return 0


def _get_section(manifest: "Manifest", section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in manifest.config.items() if key.startswith(prefix)}


def _write_adapters(
    storage: "Storage",
    manifest: "Manifest",
    weights: "WeightSource",
    *,
    out: "Storage",
    tokenizer: "TokenizerFiles",
    dtype: "ExportDtype",
) -> "Exported":
    """Write the adapters of a checkpoint, and the name of the model that they stand beside.

    Raises:
        ConfigError: it has none.
    """
    from elastic.checkpoint.hf.adapters import write_adapters
    from elastic.checkpoint.hf.saved import open_base
    from elastic.model_config import build_model_config
    from elastic.tuning import LoraConfig

    if manifest.config.get("tune", "full") == "full":
        raise ConfigError(
            f"--to peft writes adapters, and {storage.url} was trained with tune=full: it has none. Leave --to out."
        )
    try:
        origin = str(open_base(storage)[1].extra.get("origin", ""))
    except CheckpointError:  # adapters are whole without it
        origin = ""
    model, lora = build_model_config(**_get_section(manifest, "model")), LoraConfig(**_get_section(manifest, "lora"))
    files = {name: data for name, data in tokenizer.files.items() if name != "generation_config.json"}
    return write_adapters(out, model, lora, weights, origin=origin, files=files, dtype=dtype)


def _find_checkpoint(storage: "Storage", step: int | None) -> "CommittedCheckpoint":
    from elastic.checkpoint.format.manifest import list_committed

    committed = {checkpoint.step: checkpoint for checkpoint in list_committed(storage)}
    if not committed:
        raise StorageError(f"RUN={storage.url} has no finished checkpoint. Train it until one is written.")
    if step is not None and step not in committed:
        raise StorageError(
            f"--step={step}: {storage.url} has no finished checkpoint of that step. Use one of: "
            f"{', '.join(map(str, committed))}."
        )
    return committed[max(committed) if step is None else step]


def _find_tokenizer(storage: "Storage", manifest: "Manifest", named: str | None) -> "TokenizerFiles":
    """Return the tokenizer of what the checkpoint was trained on: as it was imported, else as the run keeps it.

    Raises:
        DataError: there is none, or the one that was named is not the checkpoint's.
    """
    from elastic.checkpoint.format.compat import get_data
    from elastic.data.kept import read_kept
    from elastic.data.prepared.hf_tokenizer import build_tokenizer, read_tokenizer

    identity = get_data(manifest)
    sha256 = identity.tokenizer_sha256 if identity else ""
    imported = _read_imported(storage, sha256)
    if imported and not named:
        return imported
    kept = read_kept(storage, identity) if identity and not named else None
    if kept:
        return _as_files(build_tokenizer(kept.info, kept.tokenizer_json))
    folder = named or str(manifest.config["data.path"])
    try:
        own = read_tokenizer(Path(folder))
    except FileNotFoundError:
        if imported:
            return imported
        raise DataError(
            f"data.path={folder!r} of the run is not here, and a model is of no use without its tokenizer. Name the "
            "folder that `solvent prepare` wrote with --tokenizer DIR."
        ) from None
    if sha256 and own.tokenizer_sha256 != sha256:
        what = f"--tokenizer={folder}" if named else f"data.path={folder!r}"
        raise DataError(
            f"{what} has another tokenizer than this checkpoint was trained with, so the ids of the model mean other "
            "text there. Leave --tokenizer out if the run has its own, or name the folder of the data that it was "
            "trained on with --tokenizer DIR."
        )
    if not sha256:
        print(
            f"this checkpoint does not say which tokenizer it was trained with (an older version of Solvent wrote it); "
            f"that of {folder} is taken for it",
            file=sys.stderr,
        )
    return _as_files(own)


def _read_imported(storage: "Storage", sha256: str) -> "TokenizerFiles | None":
    """Return the files that the run was imported with, if they are (or may be) of the tokenizer with this hash."""
    from elastic.checkpoint.hf.exporting import TokenizerFiles
    from elastic.checkpoint.hf.importing import KEPT

    kept = {key.removeprefix(KEPT): storage.read(key) for key in storage.list(KEPT)}
    own = kept.get("tokenizer.json")
    is_other = own is not None and sha256 and hashlib.sha256(own).hexdigest() != sha256
    if is_other or not any(name.startswith("tokenizer") for name in kept):
        return None
    config: Mapping[str, Any] = json.loads(kept.pop("config.json"))
    return TokenizerFiles(files=kept, token_ids={name: config.get(name) for name in _TOKEN_IDS})


def _as_files(own: "HfTokenizer") -> "TokenizerFiles":
    from elastic.checkpoint.hf.exporting import TokenizerFiles

    ids = {**dict.fromkeys(_TOKEN_IDS), "bos_token_id": own.bos_id, "eos_token_id": own.eot_id}
    return TokenizerFiles(files=own.files, token_ids=ids)
