"""Layers and initialisation that every model family shares.

Letters: B batch, S sequence, H heads, E size of one head.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from elastic.config import ModelConfig


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream; `init_weights` scales it by their number."""


def build_rope_tables(config: ModelConfig, seq_len: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos_SE and sin_SE of rotary position embedding, fp32.

    Cheap enough to build in every forward, which spares buffers that a move from the meta device leaves undefined.
    Source: RoFormer, arXiv:2104.09864, with the halves (not the pairs) convention of Hugging Face's Llama; the
    scaling is that of Llama 3.1, `apply_scaling` of github.com/meta-llama/llama-models.
    """
    exponents = torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling_factor != 1.0:
        turns = config.rope_original_positions * frequencies / (2 * math.pi)
        transition = config.rope_high_freq_factor - config.rope_low_freq_factor
        kept = ((turns - config.rope_low_freq_factor) / transition).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rope_scaling_factor)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequencies)
    angles_SE = torch.cat((angles, angles), dim=-1)
    return angles_SE.cos(), angles_SE.sin()


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turn queries or keys by their position, in fp32; the result has the dtype of the input."""
    x = x_BHSE.float()
    left, right = x.chunk(2, dim=-1)
    return (x * cos_SE + torch.cat((-right, left), dim=-1) * sin_SE).type_as(x_BHSE)


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int, std: float) -> None:
    """Give every parameter its first value: the same full tensors for any world size and strategy.

    Each parameter has a random generator of its own, seeded by its name, so neither order nor sharding matters.
    A rank draws one full tensor at a time and keeps its shard. The numbers depend on the type of the device.

    Matrices are normal with `std`; those of the N `ResidualLinear` layers with std / sqrt(N), so that the residual
    stream does not grow with depth (Source: GPT-2, Radford et al. 2019, section 2.3). Gains are 1, biases 0.
    """
    residual = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ResidualLinear)}
    for name, param in model.named_parameters():
        if param.ndim < 2:
            param.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(param.device).manual_seed(int.from_bytes(digest[:8], "little"))
        full = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        full.normal_(0.0, std / math.sqrt(len(residual)) if name in residual else std, generator=generator)
        if isinstance(param, DTensor):
            # src_data_rank=None: every rank cuts its own full tensor, nothing is sent
            full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(full)
