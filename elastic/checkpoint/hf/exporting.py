"""A model becomes a folder that `transformers` loads: sharded safetensors, `config.json` and tokenizer.

Nothing larger than a piece of a tensor is ever in memory, and `config.json`, without which no program takes the folder
for a model, comes last.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from elastic.checkpoint.format.sharding import ITEM_BYTES
from elastic.checkpoint.hf.families._base import Pair
from elastic.checkpoint.hf.folder import CONFIG, INDEX, WHOLE, find_family
from elastic.checkpoint.hf.numbers import from_fp32
from elastic.errors import ModelFolderError
from elastic.model_config import ModelConfig
from elastic.storage import Storage

ExportDtype = Literal["fp32", "bf16"]

_TYPES: Mapping[ExportDtype, tuple[Literal["F32", "BF16"], str]] = {
    "fp32": ("F32", "float32"),
    "bf16": ("BF16", "bfloat16"),
}
"""As safetensors and as torch call them."""
_ALIGNMENT = 8


class WeightSource(Protocol):
    """Where the numbers of a model come from."""

    def read(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the numbers of the parameter of this name in row-major order, in pieces.

        Raises:
            CheckpointError: they are damaged.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What stands beside the weights."""

    files: Mapping[str, bytes]
    """By name: ``tokenizer.json`` and others that AutoTokenizer reads."""
    token_ids: Mapping[str, object]
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of `config.json`."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    model_type: str
    num_bytes: int
    files: Sequence[str]


def check_empty(out: Storage, kind: str) -> None:
    """Refuse a folder in which something lies.

    Args:
        kind: what is to be written, in the plural.

    Raises:
        ModelFolderError: it is not empty.
    """
    if names := out.list():
        raise ModelFolderError(
            f"{out.url} is not empty ({names[0]}), and files of two {kind} in one folder would be mixed. Name a "
            "new folder, or remove this one."
        )


def write_folder(
    out: Storage,
    model: ModelConfig,
    weights: WeightSource,
    *,
    tokenizer: TokenizerFiles,
    seq_len: int,
    dtype: ExportDtype,
    max_shard_bytes: int,
) -> Exported:
    """Write a model as a folder of Hugging Face.

    Args:
        seq_len: the longest sequence that was trained on; the context if `model.max_positions` names none.
        max_shard_bytes: of one file; a tensor that is larger has a file of its own.

    Raises:
        ModelFolderError: no class of transformers computes this model, or something is at the target already.
        CheckpointError: the weights are damaged; what was written so far has no `config.json`.
        OSError: the target cannot be written.
    """
    model_type, family = find_family(model)
    check_empty(out, "models")
    shards = plan_shards(family.get_pairs(model), dtype=dtype, max_shard_bytes=max_shard_bytes)
    names = [WHOLE] if len(shards) == 1 else [_get_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    num_bytes = sum(
        out.write(name, Shard(pairs=pairs, weights=weights, dtype=dtype))
        for name, pairs in zip(names, shards, strict=True)
    )
    config = {
        **family.write_config(model),
        "model_type": model_type,
        "max_position_embeddings": model.max_positions or seq_len,
        "dtype": _TYPES[dtype][1],
        "torch_dtype": _TYPES[dtype][1],  # transformers 4
        **tokenizer.token_ids,
    }
    documents = {
        **({INDEX: _build_index(names, shards, dtype)} if len(shards) > 1 else {}),
        "generation_config.json": {key: value for key, value in tokenizer.token_ids.items() if value is not None},
    }
    files = {
        **{name: (json.dumps(content, indent=2) + "\n").encode() for name, content in documents.items()},
        **tokenizer.files,
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    for name, data in files.items():
        out.write(name, [data])
    return Exported(model_type=model_type, num_bytes=num_bytes, files=[*names, *files])


def plan_shards(pairs: Iterable[Pair], *, dtype: ExportDtype, max_shard_bytes: int) -> list[list[Pair]]:
    """Cut the tensors, in order, into files of at most so many bytes of numbers; pure."""
    shards: list[list[Pair]] = []
    used_bytes = 0
    for pair in pairs:
        num_bytes = _count_bytes(pair, dtype)
        if not shards or used_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(pair)
        used_bytes += num_bytes
    return shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The bytes of one safetensors file, made anew each time they are asked for."""

    pairs: Sequence[Pair]
    weights: WeightSource
    dtype: ExportDtype

    def __iter__(self) -> Iterator[bytes]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for pair in self.pairs:
            end = start + _count_bytes(pair, self.dtype)
            header[pair.theirs] = {
                "dtype": _TYPES[self.dtype][0],
                "shape": pair.shape,
                "data_offsets": (start, end),
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        yield len(text).to_bytes(8, "little") + text
        for pair in self.pairs:
            for numbers in self.weights.read(pair.ours):
                yield from_fp32(numbers, _TYPES[self.dtype][0])


def _build_index(names: Sequence[str], shards: Sequence[Sequence[Pair]], dtype: ExportDtype) -> dict[str, object]:
    total_bytes = sum(_count_bytes(pair, dtype) for pairs in shards for pair in pairs)
    weight_map = {pair.theirs: name for name, pairs in zip(names, shards, strict=True) for pair in pairs}
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def _get_shard_name(number: int, num_shards: int) -> str:
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def _count_bytes(pair: Pair, dtype: ExportDtype) -> int:
    return int(np.prod(pair.shape)) * ITEM_BYTES[_TYPES[dtype][0]]
