# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is installed with CUDA builds of torch alone, and a kernel is not Python)
"""Cross-entropy that turns logits into their own gradient: 3 passes over the logits, 2 of them out of L2.

Letters: N positions, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_NUM_WARPS = 16


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, *, ignore: int, wants_grad: bool) -> Tensor:
    """Return the summed nats (fp32 scalar); if wanted, overwrite the logits with the gradient of this sum."""
    num_rows, num_columns = logits_NV.shape
    assert logits_NV.is_contiguous()
    nats_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    block = min(_BLOCK, triton.next_power_of_2(num_columns))
    _cross_entropy_kernel[(num_rows,)](
        *(logits_NV, labels_N.contiguous(), nats_N, num_columns),
        IGNORE=ignore,
        WANTS_GRAD=wants_grad,
        BLOCK=block,
        num_warps=_NUM_WARPS if block == _BLOCK else 4,
    )
    return nats_N.sum()


@triton.jit
def _cross_entropy_kernel(
    logits, labels, nats, num_columns, IGNORE: tl.constexpr, WANTS_GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row. The row's first pass leaves it in L2 for the second."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    is_target = label != IGNORE
    start = logits + row * num_columns
    # Read before the reductions, whose barriers keep the writes below behind it.
    at_label = tl.load(start + label, mask=is_target, other=0.0).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    for offset in range(0, num_columns, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        x = tl.load(start + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest))
        highest = new_highest
    log_total = highest + tl.log(total)
    tl.store(nats + row, tl.where(is_target, log_total - at_label, 0.0))
    if WANTS_GRAD:
        for offset in range(0, num_columns, BLOCK):
            columns = offset + tl.arange(0, BLOCK)
            is_inside = columns < num_columns
            x = tl.load(start + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
            grad = tl.where(is_target, tl.exp(x - log_total) - (columns == label).to(tl.float32), 0.0)
            tl.store(start + columns, grad.to(logits.dtype.element_ty), mask=is_inside)
