# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is installed with CUDA builds of torch alone, and a kernel is not Python)
"""SwiGLU of gate and up that lie side by side, and its backward, which brings the product back as well.

Letters: N positions, F inner size of the feed-forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def swiglu(joined: Tensor) -> Tensor:
    """Return silu(gate) * up for joined = (gate, up)."""
    inner = joined.shape[-1] // 2
    product = joined.new_empty((*joined.shape[:-1], inner))
    _swiglu_kernel[(joined.numel() // (2 * inner), triton.cdiv(inner, _BLOCK))](joined, product, inner, BLOCK=_BLOCK)
    return product


def swiglu_backward(joined: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of joined, and silu(gate) * up, which the forward then need not keep."""
    inner = joined.shape[-1] // 2
    joined_grad, product = torch.empty_like(joined), torch.empty_like(grad)
    grid = (joined.numel() // (2 * inner), triton.cdiv(inner, _BLOCK))
    _swiglu_backward_kernel[grid](joined, grad, joined_grad, product, inner, BLOCK=_BLOCK)
    return joined_grad, product


@triton.jit
def _swiglu_kernel(joined, product, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < inner
    gate = tl.load(joined + row * 2 * inner + columns, mask=is_inside).to(tl.float32)
    up = tl.load(joined + row * 2 * inner + inner + columns, mask=is_inside).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(product + row * inner + columns, value.to(product.dtype.element_ty), mask=is_inside)


@triton.jit
def _swiglu_backward_kernel(joined, grads, joined_grads, product, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < inner
    place = row * 2 * inner + columns
    gate = tl.load(joined + place, mask=is_inside).to(tl.float32)
    up = tl.load(joined + place + inner, mask=is_inside).to(tl.float32)
    grad = tl.load(grads + row * inner + columns, mask=is_inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    gate_grad = grad * up * share * (1.0 + gate * (1.0 - share))
    kind = product.dtype.element_ty
    tl.store(joined_grads + place, gate_grad.to(kind), mask=is_inside)
    tl.store(joined_grads + place + inner, (grad * silu).to(kind), mask=is_inside)
    tl.store(product + row * inner + columns, (silu * up).to(kind), mask=is_inside)
