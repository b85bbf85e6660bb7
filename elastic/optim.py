"""AdamW over all parameters, decayed or not; `schedule` has its learning rate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic.config import OptimConfig
from elastic.lr_schedule import learning_rate
from elastic.optim_copies import CopyingAdamW
from elastic.optim_sharded import ShardedAdamW

__all__ = ["build_optimizer", "learning_rate"]


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
