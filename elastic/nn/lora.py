"""Low-rank adapters beside frozen linear layers; `elastic/tuning.py` says which layers have one.

A frozen weight is a matrix in the type that products read, or the rows of bytes of `elastic/nf4.py` (tune=qlora).

Letters: X inputs, Y outputs, R rank of an adapter.
"""

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor, nn

from elastic.nf4 import count_row_bytes
from elastic.nn.nf4_product import multiply
from elastic.tuning import LoraConfig


class Nf4Linear(nn.Linear):
    """A linear layer whose weight is frozen in 4 bits: `weight` holds bytes; takes the place of the plain layer."""

    def __init__(self, layer: nn.Linear, lora: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        shape = (layer.out_features, count_row_bytes(layer.in_features, lora.nf4_scales))
        packed = torch.empty(shape, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        """Return what the weight makes of the input."""
        return multiply(input, self.weight, self.bias)


class LoraLinear(nn.Linear):
    """A linear layer whose weight stays what it is, and an adapter that learns; takes the place of the plain layer.

    The adapter is fp32 and is cast to the type of the activations, as the frozen weight already is.
    """

    def __init__(self, layer: nn.Linear, lora: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, lora.scale
        device = layer.weight.device
        self.lora_a = nn.Parameter(torch.empty(lora.rank, layer.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(layer.out_features, lora.rank, dtype=torch.float32, device=device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        """Return what the weight makes of the input, and what the adapter adds."""
        lora_a_RX, lora_b_YR = self.lora_a.to(input.dtype), self.lora_b.to(input.dtype)
        low_rank = F.linear(input, lora_a_RX) * self.scale
        return multiply(input, self.weight, self.bias) + F.linear(low_rank, lora_b_YR)


def add_adapters(
    model: nn.Module, targets: tuple[str, ...], lora: LoraConfig, *, dtype: torch.dtype, in_4_bits: tuple[str, ...] = ()
) -> None:
    """Freeze all parameters in the type that products read, and give the target layers of each block an adapter.

    Args:
        model: on the meta device; names of its parameters stay what they are.
        targets: names of linear layers within a block.
        in_4_bits: of layers whose weights are frozen as bytes.
    """
    model.to(dtype).requires_grad_(False)
    for block in model.get_submodule("blocks").children():
        for path in in_4_bits:
            block.set_submodule(path, Nf4Linear(_get_linear(block, path), lora))
        for path in targets:
            block.set_submodule(path, LoraLinear(_get_linear(block, path), lora))


def _get_linear(block: nn.Module, path: str) -> nn.Linear:
    layer = block.get_submodule(path)
    assert isinstance(layer, nn.Linear), f"ModelConfig.block_matrices names {path}, which is no linear layer"
    return layer
