"""Begin a run from a Hugging Face folder (Llama, Qwen2, Qwen3, SmolLM, SmolLM3), instead of random weights.

The model's section of the configuration comes from the folder. The weights become the checkpoint of step 0 of the run
that CONFIG and key=value describe; train it, on any number of ranks, with the config.yaml that is written beside it.
With tune=lora or qlora the weights are kept, frozen, beside the checkpoints, and step 0 holds the adapters.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._runs import add_json, print_json
from elastic.records.rundir import RunDir

if TYPE_CHECKING:
    from elastic.checkpoint.hf.importing import Imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a folder and a configuration."""
    parser.add_argument("folder", metavar="HF_DIR", help="config.json and safetensors; also s3://, gs://, az://")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--adapter", metavar="DIR", help="go on from a LoRA adapter of PEFT; lora.* is as it says")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then import and tell how to go on."""
    from elastic.checkpoint.durable.storage_errors import GIB, check_space, check_writable, explain
    from elastic.checkpoint.hf.adapters import open_adapters
    from elastic.checkpoint.hf.folder import open_folder
    from elastic.checkpoint.hf.importing import import_folder
    from elastic.config_load import dump, load_here
    from elastic.data.prepared.format import read_info
    from elastic.data.prepared.hf_tokenizer import check_tokenizer, is_prepared
    from elastic.data.prepared.shards import check_vocab
    from elastic.mixture import get_paths
    from elastic.storage import is_url, join_url, open_storage

    start_s = time.monotonic()
    config = load_here(args.config, args.overrides)
    folder = open_folder(open_storage(args.folder))
    config = dataclasses.replace(config, model=folder.model)
    adapters = None
    if args.adapter:
        adapters = open_adapters(open_storage(args.adapter), folder.model)
        tune = "lora" if config.tune == "full" else config.tune
        lora = dataclasses.replace(adapters.lora, nf4_scales=config.lora.nf4_scales)
        config = dataclasses.replace(config, tune=tune, lora=lora)
    for key, path in get_paths(config.data).items():
        check_tokenizer(path, folder.read_tokenizer(), key=key, origin=args.folder)
        if is_prepared(path):
            check_vocab(read_info(Path(path)), config, key=key, path=path)
    run_url = join_url(config.storage, config.run)
    storage = open_storage(run_url)
    check_writable(storage)
    check_space(storage, folder.num_params * 4 if config.tune == "full" else folder.num_bytes)
    try:
        imported = import_folder(folder, storage, config, adapters=adapters)
        storage.write(RunDir(Path()).config.name, [dump(config).encode()])
    except OSError as error:
        raise explain(error, run_url) from error
    overrides = _list_changes("model", config.model)
    if config.tune != "full":
        overrides += [f"tune={config.tune}", *_list_changes("lora", config.lora)]
    start = f"{args.config} {' '.join(args.overrides + overrides)}" if is_url(run_url) else f"{run_url}/config.yaml"
    summary = {
        "run": run_url,
        "step": 0,
        "num_params": imported.num_params,
        "num_trained_params": imported.num_trained_params,
        "num_bytes": imported.num_bytes,
        "model": dataclasses.asdict(config.model),
        "start": f"solvent train {start}",
        "seconds": time.monotonic() - start_s,
    }
    if args.json:
        print_json(summary)
    else:
        print(
            f"{_tell(imported, config.tune)} {run_url}: {imported.num_bytes / GIB:.3f} GiB in "
            f"{summary['seconds']:.1f} s. Train them with: {summary['start']}"
        )
    return 0


def _list_changes(section: str, values: Any) -> list[str]:
    fields = [(field.name, getattr(values, field.name), field.default) for field in dataclasses.fields(values)]
    return [f"{section}.{name}={value}" for name, value, default in fields if value != default]


def _tell(imported: "Imported", tune: str) -> str:
    if tune != "full":
        return (
            f"adapters of {imported.num_trained_params:,} parameters, beside {imported.num_params:,} frozen ones, are "
            "step 0 of"
        )
    return f"{imported.num_params:,} parameters are step 0 of"
