# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is installed with CUDA builds of torch alone, and a kernel is not Python)
"""AdamW over many parameters in one launch; gradients are clipped and copies in low precision written on the way.

28 bytes per parameter with bf16 gradients and copies: each value is read once and written once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_NUM_ADDRESSES = 5
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class AdamWKernel:
    """The update of one group of parameters, whose shapes stay and whose gradients lie elsewhere in each step."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        sizes = torch.tensor([weight.numel() for weight in weights])
        num_blocks = (sizes + _BLOCK - 1) // _BLOCK
        tensor_of_block = torch.repeat_interleave(torch.arange(len(sizes)), num_blocks)
        first_block = num_blocks.cumsum(0) - num_blocks
        block_in_tensor = torch.arange(len(tensor_of_block)) - first_block[tensor_of_block]
        rows = (tensor_of_block, block_in_tensor, sizes[tensor_of_block])
        self._blocks = torch.stack(rows, dim=1).to(weights[0].device)
        # Loads of 16 bytes need to know that no block ends between them.
        self._is_even = bool((sizes % 16 == 0).all())
        self._addresses = self._factors = torch.empty(0)
        self._grad_dtype = self._copy_dtype = torch.float32

    def locate(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: tuple[Sequence[Tensor], Sequence[Tensor]],
        copies: Sequence[Tensor],
        *,
        factors: Tensor,
    ) -> None:
        """Send all addresses to the device, ahead of the update: nothing waits for them then.

        Args:
            factors: fp32 on the device: what gradients are multiplied by, 1 - beta1**step and sqrt(1 - beta2**step).
        """
        lists = (weights, grads, *moments, copies)
        host = torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in lists], dtype=torch.int64).T
        assert not (host % 16).any()
        host = host.contiguous()
        is_cuda = weights[0].device.type == "cuda"
        self._addresses = host.pin_memory().to(weights[0].device, non_blocking=True) if is_cuda else host
        self._factors = factors
        self._grad_dtype, self._copy_dtype = grads[0].dtype, copies[0].dtype

    def update(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Update weights, moments and copies in place."""
        _adamw_kernel[(len(self._blocks),)](
            *(self._addresses, self._blocks, self._factors, lr, betas[0], betas[1], eps, weight_decay),
            GRAD=_TYPES[self._grad_dtype],
            COPY=_TYPES[self._copy_dtype],
            NUM_ADDRESSES=_NUM_ADDRESSES,
            IS_EVEN=self._is_even,
            BLOCK=_BLOCK,
            num_warps=8,
        )


@triton.jit
def _adamw_kernel(
    addresses, blocks, factors, lr, beta1, beta2, eps, weight_decay,
    GRAD: tl.constexpr, COPY: tl.constexpr, NUM_ADDRESSES: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of one tensor."""
    place = blocks + tl.program_id(0).to(tl.int64) * 3
    row = addresses + tl.load(place) * NUM_ADDRESSES
    size = tl.load(place + 2)
    if IS_EVEN:
        size = tl.multiple_of(size, 16)
    offsets = tl.load(place + 1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < size
    weights = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16) + offsets
    grads = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD)), 16) + offsets
    firsts = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16) + offsets
    seconds = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16) + offsets
    copies = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(COPY)), 16) + offsets

    grad = tl.load(grads, mask=is_inside).to(tl.float32) * tl.load(factors)
    first = tl.load(firsts, mask=is_inside)
    second = tl.load(seconds, mask=is_inside)
    weight = tl.load(weights, mask=is_inside)
    first = first + (grad - first) * (1 - beta1)
    second = second * beta2 + grad * grad * (1 - beta2)
    scale = tl.sqrt(second) / tl.load(factors + 2) + eps
    weight = weight * (1 - lr * weight_decay) - lr / tl.load(factors + 1) * first / scale
    tl.store(firsts, first, mask=is_inside)
    tl.store(seconds, second, mask=is_inside)
    tl.store(weights, weight, mask=is_inside)
    tl.store(copies, weight.to(COPY), mask=is_inside)
