"""AdamW, and the learning rate as a pure function of the tokens seen."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic.config import OptimConfig
from elastic.optim_copies import CopyingAdamW
from elastic.optim_sharded import ShardedAdamW


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, copies: Mapping[nn.Parameter, Tensor] | None = None
) -> torch.optim.AdamW:
    """Build AdamW (fused) with two groups: matrices are decayed, vectors (gains, biases) are not.

    Args:
        copies: in low precision, one for each parameter; kept up to date by the update.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if copies:
        return CopyingAdamW(groups, copies=copies, **options)
    if isinstance(params[0], DTensor):
        return ShardedAdamW(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def learning_rate(config: OptimConfig, tokens: int, total_tokens: int) -> float:
    """Return the learning rate of the update that brings the run to `tokens` target tokens.

    Counting the update's own tokens gives the first update more than 0 and the last one exactly the minimum.

    Warm-up is linear from 0. Then `cosine` falls to `min_lr_ratio * lr` over the rest (Source: arXiv:1608.03983),
    while `wsd` stays at `lr` and falls only over the last `decay_tokens`, linearly or as 1 - sqrt(x)
    (Source: MiniCPM, arXiv:2404.06395; Haegele et al., arXiv:2405.18392, section 3).
    """
    if tokens < config.warmup_tokens:
        return config.lr * tokens / config.warmup_tokens
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * _progress(tokens, config.warmup_tokens, total_tokens))) / 2
    else:
        decay_tokens = config.decay_tokens or total_tokens // 5
        decayed = _progress(tokens, max(config.warmup_tokens, total_tokens - decay_tokens), total_tokens)
        share = 1 - (math.sqrt(decayed) if config.decay_shape == "sqrt" else decayed)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def _progress(tokens: int, start: int, end: int) -> float:
    """Return how far `tokens` is from `start` (0) to `end` (1), clamped."""
    if tokens >= end:
        return 1.0
    return max(0.0, (tokens - start) / (end - start))
