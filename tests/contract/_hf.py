"""A small Hugging Face folder of three files, made without transformers."""

import numpy as np

from elastic.checkpoint.hf.exporting import TokenizerFiles, write_folder
from elastic.checkpoint.hf.folder import find_family
from elastic.models.llama import Config as ModelConfig
from elastic.storage import open_storage

MODEL = ModelConfig(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=12, vocab_size=16, tied_head=False, max_positions=64
)


class Noise:
    """Weights that are a function of their name; a head has those of the embedding."""

    def __init__(self, model):
        self.sizes = {pair.ours: np.prod(pair.shape) for pair in find_family(model)[1].get_pairs(model)}

    def read(self, name):
        yield np.random.default_rng(len(name.replace("head", "embed"))).standard_normal(self.sizes[name], np.float32)


def write_hf_folder(url, model=MODEL, *, files=None):
    """Write it to a path or URL, with more files beside the weights."""
    ids = {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}
    tokenizer = TokenizerFiles(files=files or {}, token_ids=ids)
    settings = {"seq_len": 4, "dtype": "fp32", "max_shard_bytes": 2200}
    write_folder(open_storage(url), model, Noise(model), tokenizer=tokenizer, **settings)
    return url
