"""What surrounds the products of a block, for layers whose inputs were joined (`elastic.nn.layers.Joinable`).

torch.compile treats each of these operations as one. It would fuse them as well, but writes gradients of the parts of a
joined product through a mask over all of them, and keeps the product of gate and up for the backward.

Letters: B batch, S sequence, X all heads' sizes, H query heads, K key/value heads, E size of one head, F inner size of
the feed-forward, D dim.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor


@torch.library.custom_op("solvent::swiglu_down", mutates_args=())
def swiglu_down(joined_BSF: Tensor, weight_DF: Tensor) -> Tensor:
    """Return (silu(gate) * up) @ weight.T for joined = (gate, up); keeps joined alone for the backward."""
    if joined_BSF.device.type == "cuda":
        from elastic.nn.kernels.swiglu import swiglu  # noqa: PLC0415 - Triton is where GPUs are

        return F.linear(swiglu(joined_BSF), weight_DF)
    gate, up = joined_BSF.float().chunk(2, dim=-1)
    return F.linear((F.silu(gate) * up).type_as(joined_BSF), weight_DF)


@swiglu_down.register_fake
def _(joined_BSF: Tensor, weight_DF: Tensor) -> Tensor:
    return joined_BSF.new_empty((*joined_BSF.shape[:-1], weight_DF.shape[0]))


@torch.library.custom_op("solvent::swiglu_down_backward", mutates_args=())
def _swiglu_down_backward(grad_BSD: Tensor, joined_BSF: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    product_grad = grad_BSD @ weight_DF
    if grad_BSD.device.type == "cuda":
        from elastic.nn.kernels.swiglu import swiglu_backward  # noqa: PLC0415 - Triton is where GPUs are

        joined_grad, product = swiglu_backward(joined_BSF, product_grad)
    else:
        gate, up = joined_BSF.float().chunk(2, dim=-1)
        share = gate.sigmoid()
        silu, wide_grad = gate * share, product_grad.float()
        parts = (wide_grad * up * share * (1 + gate * (1 - share)), wide_grad * silu)
        joined_grad, product = torch.cat(parts, dim=-1).type_as(grad_BSD), (silu * up).type_as(grad_BSD)
    return joined_grad, grad_BSD.flatten(0, -2).T @ product.flatten(0, -2)


@_swiglu_down_backward.register_fake
def _(grad_BSD: Tensor, joined_BSF: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(joined_BSF), torch.empty_like(weight_DF)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_down_backward(grad_BSD.contiguous(), *ctx.saved_tensors)


swiglu_down.register_autograd(_swiglu_backward, setup_context=_keep)


@torch.library.custom_op("solvent::split_and_rotate", mutates_args=())
def split_and_rotate(
    joined_BSX: Tensor, cos_SE: Tensor, sin_SE: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut query_BSHE, key_BSKE and value_BSKE out of one product, and turn the first two by their position.

    The tables may be cos_BSE and sin_BSE.
    """
    if joined_BSX.device.type == "cuda":
        from elastic.nn.kernels import rotate  # noqa: PLC0415 - Triton is where GPUs are

        return rotate.split_and_rotate(joined_BSX, cos_SE, sin_SE, num_heads, num_kv_heads)
    heads = joined_BSX.float().unflatten(-1, (-1, cos_SE.shape[-1]))
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    turned = [_rotate_heads(part, cos_SE, sin_SE).type_as(joined_BSX) for part in (query, key)]
    return turned[0], turned[1], value.to(joined_BSX.dtype, copy=True).contiguous()


@split_and_rotate.register_fake
def _(
    joined_BSX: Tensor, cos_SE: Tensor, sin_SE: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    query, key, value = (joined_BSX.new_empty((*joined_BSX.shape[:2], num, cos_SE.shape[-1])) for num in sizes)
    return query, key, value


@torch.library.custom_op("solvent::join_rotated", mutates_args=())
def _join_rotated(query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    if query_BSHE.device.type == "cuda":
        from elastic.nn.kernels import rotate  # noqa: PLC0415 - Triton is where GPUs are

        query, key, value = (part.contiguous() for part in (query_BSHE, key_BSKE, value_BSKE))
        return rotate.join_rotated(query, key, value, cos_SE, sin_SE)
    turned = [_rotate_heads(part.float(), cos_SE, -sin_SE).type_as(part) for part in (query_BSHE, key_BSKE)]
    return torch.cat([*turned, value_BSKE], dim=2).flatten(2)


@_join_rotated.register_fake
def _(query_BSHE: Tensor, key_BSKE: Tensor, value_BSKE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    num_heads = query_BSHE.shape[2] + 2 * key_BSKE.shape[2]
    return query_BSHE.new_empty((*query_BSHE.shape[:2], num_heads * query_BSHE.shape[3]))


def _keep_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _rotate_backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
    cos_SE, sin_SE = ctx.saved_tensors
    return _join_rotated(query, key, value, cos_SE, sin_SE), None, None, None, None


split_and_rotate.register_autograd(_rotate_backward, setup_context=_keep_tables)


def _rotate_heads(x_BSHE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turn each head by its position; with -sin, turn it back."""
    left, right = x_BSHE.chunk(2, dim=-1)
    cos, sin = cos_SE.unsqueeze(-2), sin_SE.unsqueeze(-2)
    return x_BSHE * cos + torch.cat((-right, left), dim=-1) * sin
