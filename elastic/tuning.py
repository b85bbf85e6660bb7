"""What is trained of a model: all of it, or low-rank adapters beside frozen weights (LoRA). No torch here.

Source: LoRA, arXiv:2106.09685; scaling by the root of the rank (rsLoRA), arXiv:2312.03732; frozen weights in 4 bits
(QLoRA), arXiv:2305.14314.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from elastic.constraints import POSITIVE, check_fields
from elastic.errors import ConfigError
from elastic.model_config import ModelConfig
from elastic.nf4 import BLOCK, Scales, count_row_bytes

Tune = Literal["full", "lora", "qlora"]

LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of an adapter's matrices, beside the `weight` of the layer: rank x inputs, and outputs x rank."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of tune=lora and qlora: a layer adds ``scale * B(A(x))`` to what its frozen weight makes of x.

    They have no dropout.
    """

    rank: Annotated[int, POSITIVE] = 16
    alpha: Annotated[float, POSITIVE] = 32.0
    """The adapter's output counts alpha / rank times."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """sqrt_rank: alpha / sqrt(rank) times (rsLoRA), for high ranks."""
    targets: str = "all"
    """Which linear layers of each block have an adapter: all, or names with commas between them (query,value)."""
    nf4_scales: Scales = "uint8"
    """tune=qlora only: the scales of blocks of 64 weights. uint8: double quantisation, 0.52 bytes a weight; fp32: 0.56,
    with a thousandth less rounding."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="lora.", error=ConfigError)

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def find_targets(self, model: ModelConfig) -> tuple[str, ...]:
        """Return the layers that have an adapter, by their names within a block (`attention.query`).

        Raises:
            ConfigError: the model has no such layer.
        """
        layers = {name.rpartition(".")[2]: name for name in model.block_matrices}
        if not layers:
            raise ConfigError(
                f"tune=lora and qlora need the shapes of a block's linear layers, and model.kind={model.kind} does not "
                "say them (ModelConfig.block_matrices). Set tune=full."
            )
        wanted = layers.keys() if self.targets == "all" else {name.strip() for name in self.targets.split(",")}
        if unknown := sorted(wanted - layers.keys()):
            raise ConfigError(
                f"lora.targets={self.targets!r}: a block of model.kind={model.kind} has no linear layer "
                f"{unknown[0]!r}. Use all, or some of {','.join(layers)}."
            )
        return tuple(path for name, path in layers.items() if name in wanted)


def get_adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Mapping[str, tuple[int, int]]:
    """Return the shapes of all adapters by the names that they have in the model's `state_dict`.

    Raises:
        ConfigError: the model has no such layers.
    """
    shapes: dict[str, tuple[int, int]] = {}
    targets = lora.find_targets(model)
    for index in range(model.num_layers):
        for path in targets:
            num_out, num_in = model.block_matrices[path]
            shapes[f"blocks.{index}.{path}.{LORA_A}"] = (lora.rank, num_in)
            shapes[f"blocks.{index}.{path}.{LORA_B}"] = (num_out, lora.rank)
    return shapes


def find_in_4_bits(model: ModelConfig, tune: Tune) -> tuple[str, ...]:
    """Return the layers whose frozen weights are in 4 bits, by their names within a block: all or none.

    Raises:
        ConfigError: their rows cannot be cut into blocks.
    """
    if tune != "qlora":
        return ()
    for name, (_, num_in) in model.block_matrices.items():
        if num_in % BLOCK:
            raise ConfigError(
                f"tune=qlora scales frozen weights in blocks of {BLOCK}, and the rows of {name} have {num_in} in this "
                "model: they cannot be cut into such. Set tune=lora."
            )
    return tuple(model.block_matrices)


def count_frozen_bytes(model: ModelConfig, lora: LoraConfig, tune: Tune, *, item_bytes: int) -> int:
    """Return what the frozen weights take on the device that holds them all.

    Args:
        item_bytes: of a number in the type that products read.
    """
    matrices = [model.block_matrices[path] for path in find_in_4_bits(model, tune)]
    num_in_4_bits = model.num_layers * sum(num_out * num_in for num_out, num_in in matrices)
    packed_bytes = model.num_layers * sum(
        num_out * count_row_bytes(num_in, lora.nf4_scales) for num_out, num_in in matrices
    )
    return item_bytes * (model.num_params - num_in_4_bits) + packed_bytes
