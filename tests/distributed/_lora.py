"""A small model of others, imported into a run that trains adapters beside it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from elastic.checkpoint.hf.adapters import open_adapters
from elastic.checkpoint.hf.exporting import TokenizerFiles, write_folder
from elastic.checkpoint.hf.folder import find_family, open_folder
from elastic.checkpoint.hf.importing import import_folder
from elastic.config import RunConfig
from elastic.models.llama import Config as ModelConfig
from elastic.storage import open_storage
from elastic.tuning import LoraConfig
from tests.distributed._loops import make_config

MODEL = ModelConfig(
    dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=64, vocab_size=300, max_positions=64, tied_head=False
)
MODELS = {"lora": MODEL, "qlora": replace(MODEL, dim=64, ffn_dim=128)}
"""By `tune`: rows in 4 bits are multiples of 64."""
LORA = LoraConfig(rank=4, alpha=12.0)


class Noise:
    """Weights small enough for a model that learns, large enough that it is not the same to all tokens."""

    def __init__(self, model):
        self.shapes = {pair.ours: pair.shape for pair in find_family(model)[1].get_pairs(model)}

    def read(self, name):
        numbers = np.random.default_rng(list(name.encode())).standard_normal(self.shapes[name], np.float32)
        yield (1 + 0.1 * numbers if numbers.ndim == 1 else 0.15 * numbers).astype(np.float32).reshape(-1)


def write_theirs(folder: Path, *, dtype="fp32") -> None:
    for tune, model in MODELS.items():
        _write_model(folder / tune, model, dtype)


def _write_model(folder: Path, model: ModelConfig, dtype: str) -> None:
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    write_folder(
        open_storage(folder),
        model,
        Noise(model),
        tokenizer=TokenizerFiles(files={}, token_ids=ids),
        seq_len=64,
        dtype=dtype,
        max_shard_bytes=60_000,
    )


def make_lora_config(folder: Path, run: str, *, steps: int, **changes) -> RunConfig:
    config = make_config(folder, run, steps=steps, every_steps=3)
    tune = changes.pop("tune", "lora")
    return replace(config, **{"model": MODELS[tune], "tune": tune, "lora": LORA, **changes})


def import_theirs(theirs: Path, config: RunConfig, adapter: Path | None = None):
    run = open_storage(f"{config.storage}/{config.run}")
    model = open_folder(open_storage(theirs / config.tune))
    adapters = open_adapters(open_storage(adapter), model.model) if adapter else None
    return import_folder(model, run, config, adapters=adapters, file_bytes=50_000)
