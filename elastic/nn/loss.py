"""The training loss, as a sum, so that it can be divided once by the token count of all ranks.

The output layer is part of it: logits are the largest tensor of a step (4 GB for 16k tokens and a vocabulary of 128k),
so they exist once, in low precision, and become their own gradient in place.

Letters: N positions (B times S), D dim, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor

IGNORE = -100
"""Label of a position that has no target: padding, or the filling rows of a batch that ranks cannot share evenly."""

Microbatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""(tokens_BS, labels_BS), int64; where rows hold several documents also borders_N (`elastic.nn.attention.separate`)."""

MAX_LOGITS_BYTES = 2**32
"""Positions are taken in chunks whose logits fit into this. One chunk is fastest: a second one makes the weight's
gradient a running sum in fp32."""


def sum_cross_entropy(hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` in nats (fp32 scalar); ignored positions add 0."""
    if torch.is_autocast_enabled(hidden_BSD.device.type):
        dtype = torch.get_autocast_dtype(hidden_BSD.device.type)
        hidden_BSD, weight_VD = hidden_BSD.to(dtype), weight_VD.to(dtype)
    hidden_ND, labels_N = hidden_BSD.flatten(0, 1), labels_BS.flatten()
    with torch.autocast(hidden_BSD.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, torch.is_grad_enabled())  # pyright: ignore[reportReturnType] # apply is untyped


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the logits is known in the forward, up to a factor that the backward brings."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, wants_grad: bool) -> Tensor:
        row_bytes = weight_VD.shape[0] * weight_VD.element_size()
        num_rows = max(1, MAX_LOGITS_BYTES // row_bytes)
        wants_weight_grad = wants_grad and ctx.needs_input_grad[1]  # a frozen output layer needs none
        ctx.is_whole = hidden_ND.shape[0] <= num_rows
        if ctx.is_whole:
            logits_NV = hidden_ND @ weight_VD.T
            nats = _to_gradient_(logits_NV, labels_N, wants_grad=wants_grad)
            ctx.save_for_backward(hidden_ND, weight_VD, logits_NV)
            return nats
        nats, weight_grad_VD, hidden_grads = hidden_ND.new_zeros((), dtype=torch.float32), None, list[Tensor]()
        for chunk_ND, chunk_labels_N in zip(hidden_ND.split(num_rows), labels_N.split(num_rows), strict=True):
            logits_NV = chunk_ND @ weight_VD.T
            nats = nats + _to_gradient_(logits_NV, chunk_labels_N, wants_grad=wants_grad)
            if wants_grad:
                hidden_grads.append(logits_NV @ weight_VD)
                if wants_weight_grad:
                    weight_grad_VD = _add_product(weight_grad_VD, logits_NV.T, chunk_ND)
        if wants_grad:
            ctx.save_for_backward(torch.cat(hidden_grads), weight_grad_VD)
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (factor,) = grads
        if ctx.is_whole:
            hidden_ND, weight_VD, grad_NV = ctx.saved_tensors
            weight_grad_VD = grad_NV.T @ (hidden_ND * factor) if ctx.needs_input_grad[1] else None
            return (grad_NV @ weight_VD) * factor, weight_grad_VD, None, None
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        if weight_grad_VD is not None:
            weight_grad_VD = (weight_grad_VD * factor).to(hidden_grad_ND.dtype)
        return hidden_grad_ND * factor, weight_grad_VD, None, None


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, summed and kept in fp32."""
    if left.device.type != "cuda" or left.dtype == torch.float32:
        product = left.float() @ right.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32)


def _to_gradient_(logits_NV: Tensor, labels_N: Tensor, *, wants_grad: bool) -> Tensor:
    """Return the summed nats; if wanted, overwrite the logits with the gradient of this sum."""
    if logits_NV.device.type == "cuda":
        from elastic.nn.kernels.cross_entropy import cross_entropy_  # noqa: PLC0415 - Triton is where GPUs are

        return cross_entropy_(logits_NV, labels_N, ignore=IGNORE, wants_grad=wants_grad)
    log_probs_NV = F.log_softmax(logits_NV.float(), dim=-1)
    nats = F.nll_loss(log_probs_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    if wants_grad:
        is_target_N = labels_N != IGNORE
        grad_NV = log_probs_NV.exp_()
        grad_NV[is_target_N.nonzero().squeeze(1), labels_N[is_target_N]] -= 1
        logits_NV.copy_(grad_NV.mul_(is_target_N.unsqueeze(1)))
    return nats
