"""AdamW over all parameters of a model; `lr_schedule` has its learning rate.

A strategy chooses what suits how it spreads a model: this class, or one that clips and updates in another way.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic.config import OptimConfig


class AdamW(torch.optim.AdamW):
    """AdamW (fused) with two groups: matrices are decayed, vectors (gains, biases) are not."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        params = [param for param in model.parameters() if param.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [param for param in params if param.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self._in_model_order = params

    def clip(self, max_norm: float) -> Tensor:
        """Bring the norm of all gradients down to `max_norm`, now or in the next update; return what it was."""
        return nn.utils.clip_grad_norm_(self._in_model_order, max_norm)

    def refresh(self) -> None:
        """Bring the state to where a save reads it, if updates leave it elsewhere; all ranks call it before a save."""
