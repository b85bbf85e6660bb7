"""LoRA adapters as PEFT keeps them: `adapter_config.json` and one file of safetensors. No torch here, never a pickle.

Source: `LoraConfig` and `get_peft_model_state_dict` of github.com/huggingface/peft, 0.21.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.hf.exporting import ExportDtype, Exported, Shard, WeightSource, check_empty
from elastic.checkpoint.hf.families._base import Pair
from elastic.checkpoint.hf.folder import StoredTensor, explain_read, find_family, read_header, read_json, read_pieces
from elastic.errors import ConfigError, ModelFolderError
from elastic.model_config import ModelConfig
from elastic.storage import Storage
from elastic.tuning import LORA_A, LORA_B, LoraConfig, get_adapter_shapes

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MUST_BE: Mapping[str, object] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Keys whose other values would be computed differently; what is empty counts as left out."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A folder of PEFT that was found fit to be imported; the numbers themselves are not yet read."""

    storage: Storage
    lora: LoraConfig
    tensors: Mapping[str, StoredTensor]
    """By the names that they have in our `state_dict`."""

    def read(self, tensor: StoredTensor, *, piece_bytes: int) -> Iterator[memoryview]:
        """See `ModelFolder.read`."""
        return read_pieces(self.storage, tensor, piece_bytes=piece_bytes)


def open_adapters(storage: Storage, model: ModelConfig) -> AdapterFolder:
    """Check a folder of PEFT from its headers: all adapters are of this model and of one kind, and none is left over.

    Raises:
        ModelFolderError: it cannot be imported as it is.
    """
    try:
        return _open_adapters(storage, model)
    except OSError as error:
        raise explain_read(error, storage) from error


def _open_adapters(storage: Storage, model: ModelConfig) -> AdapterFolder:
    raw = read_json(storage, ADAPTER_CONFIG, of="an adapter, as `save_pretrained` of PEFT writes it")
    for key, value in _MUST_BE.items():
        if (raw.get(key) or value or None) != (value or None):
            raise ModelFolderError(
                f"{storage.url}/{ADAPTER_CONFIG}: {key}={raw[key]!r}, but the adapters here have {key}={value!r} and "
                "would compute something else. Import a plain LoRA adapter."
            )
    if storage.get_size(ADAPTER) is None:
        raise ModelFolderError(
            f"{storage.url} has no {ADAPTER}. Fetch it as well; if there is a pickle (adapter_model.bin) instead, load "
            "the adapter with PEFT, if you trust it, and call save_pretrained."
        )
    stored = dict(read_header(storage, ADAPTER))
    lora = _find_lora(storage, model, raw, stored)
    pairs = get_adapter_pairs(model, lora)
    for pair in pairs:
        found = stored.pop(pair.theirs, None)
        if found is None or found.shape != pair.shape:
            raise ModelFolderError(
                f"{storage.url}/{ADAPTER}: {pair.theirs} has the shape {found and list(found.shape)} (None: it is not "
                f"there), and with r={lora.rank} and this model it is {list(pair.shape)}. Import the adapter with the "
                "model that it was trained on."
            )
    if stored:
        raise ModelFolderError(
            f"{storage.url}/{ADAPTER}: {len(stored)} tensors, {min(stored)} first, have no place beside the linear "
            "layers of the blocks of this model, and would be left unused. Import an adapter of these alone."
        )
    tensors = dict(read_header(storage, ADAPTER))
    return AdapterFolder(storage=storage, lora=lora, tensors={pair.ours: tensors[pair.theirs] for pair in pairs})


def _find_lora(
    storage: Storage, model: ModelConfig, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> LoraConfig:
    """Return what the adapters are; the tensors say which layers have one: `target_modules` may be a pattern."""
    every = LoraConfig(rank=1)
    named = {pair.theirs: pair.ours for pair in get_adapter_pairs(model, every)}
    targets = {named[name].split(".")[-2] for name in stored if name in named}
    try:
        return LoraConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            scaling="sqrt_rank" if raw.get("use_rslora") else "rank",
            targets=_name_targets(model, targets),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ModelFolderError(
            f"{storage.url}/{ADAPTER_CONFIG}: r={raw.get('r')!r}, lora_alpha={raw.get('lora_alpha')!r} are no rank and "
            f"scale ({error}). Take the file that the adapter was published with."
        ) from None


def _name_targets(model: ModelConfig, targets: set[str]) -> str:
    names = [path.rpartition(".")[2] for path in model.block_matrices]
    return "all" if not targets or targets == set(names) else ",".join(name for name in names if name in targets)


def get_adapter_pairs(model: ModelConfig, lora: LoraConfig) -> tuple[Pair, ...]:
    """Return all matrices of adapters under both names.

    Raises:
        ModelFolderError: no class of transformers computes this model.
        ConfigError: it has no such layers.
    """
    _, family = find_family(model)
    theirs = {pair.ours: pair.theirs for pair in family.get_pairs(model)}
    pairs: list[Pair] = []
    for ours, shape in get_adapter_shapes(model, lora).items():
        layer, _, matrix = ours.rpartition(".")
        name = theirs[f"{layer}.weight"].removesuffix(".weight")
        kind = {LORA_A: "lora_A", LORA_B: "lora_B"}[matrix]
        pairs.append(Pair(ours=ours, theirs=f"{_PREFIX}{name}.{kind}.weight", shape=shape))
    return tuple(pairs)


def write_adapters(
    out: Storage,
    model: ModelConfig,
    lora: LoraConfig,
    weights: WeightSource,
    *,
    origin: str,
    files: Mapping[str, bytes],
    dtype: ExportDtype,
) -> Exported:
    """Write adapters as a folder that `PeftModel.from_pretrained` loads.

    Args:
        origin: where the model that they stand beside was imported from.
        files: what else the folder shall have, by name.

    Raises:
        ModelFolderError: no class of transformers computes this model, or something is at the target already.
        CheckpointError: the weights are damaged; what was written so far has no `adapter_config.json`.
        OSError: the target cannot be written.
    """
    model_type, _ = find_family(model)
    check_empty(out, "adapters")
    pairs = get_adapter_pairs(model, lora)
    num_bytes = out.write(ADAPTER, Shard(pairs=pairs, weights=weights, dtype=dtype))
    modules: Sequence[str] = sorted({pair.theirs.split(".")[-3] for pair in pairs})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.scaling == "sqrt_rank",
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    written = {**files, ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    for name, data in written.items():
        out.write(name, [data])
    return Exported(model_type=model_type, num_bytes=num_bytes, files=[ADAPTER, *written])
