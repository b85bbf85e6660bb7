"""Layers and initialisation that every model family shares.

Letters: B batch, S sequence, H heads, E size of one head.
"""

import hashlib
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from elastic.model_config import Rope
from elastic.nf4 import CODEBOOK, read_row_format
from elastic.tuning import LORA_A, LORA_B


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream; `init_weights` scales it by their number."""


class Joinable(nn.Module):
    """Has linear layers that read one input, which a copy of it may compute as one product.

    Separate small products leave most of a GPU idle: the two key/value projections of a 1.5 B model keep a quarter of
    an H100 busy when their weights' gradients are computed.
    """

    def __init__(self, *together: str) -> None:
        super().__init__()
        self._together = together
        self.joined: nn.Linear | None = None

    def project(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """Return what each of the layers makes of x."""
        if self.joined is None:
            return tuple(layer(x_BSD) for layer in self._layers())
        return torch.split(self.joined(x_BSD), [layer.out_features for layer in self._layers()], dim=-1)

    def join(self) -> None:
        """Put the weights of the layers, unless they have biases, into one layer; theirs become views of its weight."""
        layers = self._layers()
        # each part must begin where 16 bytes can be read at once
        if any(len(list(layer.parameters())) > 1 or layer.weight.nbytes % 16 for layer in layers):
            return
        sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.joined = nn.Linear(layers[0].in_features, sum(sizes), bias=False, device="meta")
        self.joined.weight = nn.Parameter(weight)
        for layer, part in zip(layers, weight.split(sizes), strict=True):
            del layer.weight
            layer.weight = part  # pyright: ignore[reportAttributeAccessIssue] # a plain tensor: nothing to train

    def get_joined(self) -> dict[str, Tensor]:
        """Return the places of the joined layers' weights by their names."""
        if self.joined is None:
            return {}
        return {f"{name}.weight": layer.weight for name, layer in zip(self._together, self._layers(), strict=True)}

    def _layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, self.get_submodule(name)) for name in self._together]


def build_rope_tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos_SE and sin_SE of rotary position embedding for positions_S, or _BSE for positions_BS, fp32.

    Cheap enough to build in every forward, which spares buffers that a move from the meta device leaves undefined.
    Source: RoFormer, arXiv:2104.09864, with the halves (not the pairs) convention of Hugging Face's Llama; the
    scaling is that of Llama 3.1, `apply_scaling` of github.com/meta-llama/llama-models.
    """
    exponents = torch.arange(0, rope.head_size, 2, device=positions.device, dtype=torch.float32) / rope.head_size
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling_factor != 1.0:
        turns = rope.original_positions * frequencies / (2 * math.pi)
        transition = rope.high_freq_factor - rope.low_freq_factor
        kept = ((turns - rope.low_freq_factor) / transition).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / rope.scaling_factor)
    angles = positions.float().unsqueeze(-1) * frequencies
    angles_SE = torch.cat((angles, angles), dim=-1)
    return angles_SE.cos(), angles_SE.sin()


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turn queries or keys by their position, in fp32; the result has the dtype of the input."""
    x, cos_SE, sin_SE = x_BHSE.float(), cos_SE.unsqueeze(-3), sin_SE.unsqueeze(-3)  # of all heads alike
    left, right = x.chunk(2, dim=-1)
    return (x * cos_SE + torch.cat((-right, left), dim=-1) * sin_SE).type_as(x_BHSE)


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int, std: float) -> None:
    """Give every parameter its first value: the same full tensors for any world size and strategy.

    Each parameter has a random generator of its own, seeded by its name, so neither order nor sharding matters.
    A rank draws one full tensor at a time and keeps its shard. The numbers depend on the type of the device.

    Matrices are normal with `std`; those of the N `ResidualLinear` layers with std / sqrt(N), so that the residual
    stream does not grow with depth (Source: GPT-2, Radford et al. 2019, section 2.3). Gains are 1, biases 0.
    Adapters begin without effect: the first of their matrices is uniform, as that of a linear layer of torch is, the
    second 0 (Source: LoRA, arXiv:2106.09685, section 4.1). Weights in 4 bits, which only measurements
    begin at random, have random codes.
    """
    residual = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ResidualLinear)}
    for name, param in model.named_parameters():
        if param.ndim < 2 or name.endswith(f".{LORA_B}"):
            param.fill_(1.0 if param.ndim < 2 and not name.endswith("bias") else 0.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(param.device).manual_seed(int.from_bytes(digest[:8], "little"))
        full = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        if param.dtype == torch.uint8:
            full.random_(generator=generator)
            _set_nf4_scales(full, std=std)
        elif name.endswith(f".{LORA_A}"):
            limit = 1 / math.sqrt(param.shape[1])
            full.uniform_(-limit, limit, generator=generator)
        else:
            full.normal_(0.0, std / math.sqrt(len(residual)) if name in residual else std, generator=generator)
        if isinstance(param, DTensor):
            # src_data_rank=None: every rank cuts its own full tensor, nothing is sent
            full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(full)


def _set_nf4_scales(packed_YN: Tensor, *, std: float) -> None:
    """Give rows of 4-bit weights whose codes are random the one scale that makes their standard deviation `std`."""
    num_columns, scales = read_row_format(packed_YN.shape[1])
    scale = std / math.sqrt(sum(code**2 for code in CODEBOOK) / len(CODEBOOK))
    tail_YN = packed_YN[:, num_columns // 2 :]
    if scales == "uint8":
        tail_YN[:, :-4] = 255
        tail_YN, scale = tail_YN[:, -4:], scale / 255
    number = torch.tensor([scale], dtype=torch.float32, device=packed_YN.device).view(torch.uint8)
    tail_YN.copy_(number.repeat(tail_YN.shape[1] // 4))
