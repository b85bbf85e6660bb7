"""Activation checkpointing: memory for time, block by block.

The block's `forward` is replaced, not the block: parameter names stay, and FSDP2's hooks, which run around
`forward`, are not run a second time when the backward recomputes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from elastic.config import Recompute

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""What `selective` keeps: matrix products and attention. All else (norms, rotation, SwiGLU) is cheap to do again."""


def _keep_products(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Tensor], recompute: Recompute) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def run(*inputs: Tensor) -> Tensor:
        return checkpoint(forward, *inputs, **options)

    return run


def set_recompute(block: nn.Module, recompute: Recompute) -> None:
    """Let a block keep for its backward all activations (none), costly products (selective) or its input (full)."""
    if recompute != "none":
        block.forward = _checkpointed(block.forward, recompute)


def set_compile(block: nn.Module) -> None:
    """Compile a block's forward, recomputation included; call it after `set_recompute`."""
    block.forward = torch.compile(block.forward)
