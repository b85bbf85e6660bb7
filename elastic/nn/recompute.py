"""Activation checkpointing: memory for time, block by block.

The block's `forward` is replaced, not the block: parameter names stay, and FSDP2's hooks, which run around
`forward`, are not run a second time when the backward recomputes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from elastic.config import Recompute
from elastic.nn.attention import FA4, VARLEN
from elastic.nn.nf4_product import NF4_PRODUCT

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    FA4,
    VARLEN,
}
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    NF4_PRODUCT,
}
_KEPT = _ATTENTION | _PRODUCTS
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
    """Let a block keep for its backward all activations (none), costly products (selective) or its input (full).

    So does offload, for a start (`set_offload`).

    With `budget` the compiler chooses (`set_budget`).
    """
    if recompute in ("selective", "full", "offload"):
        block.forward = _checkpointed(block.forward, recompute)


def set_compile(block: nn.Module) -> None:
    """Compile a block's forward, recomputation included; call it after `set_recompute`."""
    block.forward = torch.compile(block.forward)


def set_offload(block: nn.Module) -> None:
    """Let a block's input wait for the backward in host memory; call it last.

    Copies are made in the order of the computation: each waits for what made the input, and memory is free for what
    comes after. Around compiled code, as the compiler would take the hooks to be a part of it.
    """
    forward: Callable[..., Tensor] = block.forward

    def run(x_BSD: Tensor, *others: Tensor) -> Tensor:
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(_put_into_host, x_BSD), _bring_back)
        with hooks:
            return forward(x_BSD, *others)

    block.forward = run


def _put_into_host(input_BSD: Tensor, saved: Tensor) -> tuple[Tensor, torch.device | None]:
    """Return a saved tensor as it is kept, and the device that it comes back to; None: it has not left."""
    if saved.shape != input_BSD.shape or saved.data_ptr() != input_BSD.data_ptr():
        return saved, None  # weights, which others hold anyway, and tables of positions, which all blocks share
    host = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=saved.device.type == "cuda")
    return host.copy_(saved, non_blocking=True), saved.device


def _bring_back(kept: tuple[Tensor, torch.device | None]) -> Tensor:
    tensor, device = kept
    return tensor if device is None else tensor.to(device, non_blocking=True)


def set_budget(budget: float) -> None:
    """Let compiled blocks keep this share of their activations' bytes: those that cost most time per byte.

    A setting of the process, read when a block is first run; 1 leaves the compiler to itself.
    """
    torch._functorch.config.activation_memory_budget = budget
    torch._functorch.config.activation_memory_budget_runtime_estimator = "flops" if budget == 1 else _Roofline()  # pyright: ignore[reportAttributeAccessIssue] # typed as its default


class _Roofline(CustomRuntimeEstimator):
    """Seconds that an operation takes if it is done again.

    Torch's own estimator counts FLOPs alone: norms and SwiGLU would cost nothing, and grouped queries break it. Rates
    are those measured on an H100 (`solvent bench`, FACTS of `tests/gpu`); what counts is their ratio.
    """

    products_flops_per_s = 700e12
    attention_flops_per_s = 400e12
    bytes_per_s = 2.5e12

    def __call__(self, node: fx.Node) -> float:
        shapes = [tuple(value.shape) for value in _get_values(node.args)]
        if node.target in _ATTENTION and shapes:
            # batch, heads and size of a head in any order; causal: half of 2 products
            sequence = max(shapes[0][1:3])
            return 2.0 * math.prod(shapes[0]) * sequence / self.attention_flops_per_s
        if node.target in _PRODUCTS and len(shapes) >= 2:
            return 2.0 * math.prod(shapes[-2]) * shapes[-1][-1] / self.products_flops_per_s
        return sum(value.nbytes for value in _get_values([node, *node.args])) / self.bytes_per_s

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _get_values(nodes: Any) -> list[Tensor]:
    values = [argument.meta.get("val") for argument in nodes if isinstance(argument, fx.Node)]
    return [value for value in values if isinstance(value, Tensor)]
