"""Products with frozen weights in 4 bits (`elastic/nf4.py`), which are unpacked for each and not kept.

They are operators of their own: the compiler would find that forward and backward make the same numbers of the bytes,
and keep the weights in 16 bits in between.

Letters: X inputs, Y outputs, N bytes of a row.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the name all of torch's own documentation uses
from torch import Tensor

from elastic.nf4 import BLOCK, CODEBOOK, read_row_format


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a linear layer makes of its inputs; a weight of bytes is in 4 bits."""
    if weight.dtype != torch.uint8:
        return F.linear(inputs, weight, bias)
    product = NF4_PRODUCT(inputs, weight)
    return product if bias is None else product + bias


@torch.library.custom_op("solvent::nf4_product", mutates_args=())
def nf4_product(inputs: Tensor, packed_YN: Tensor) -> Tensor:
    """Return ``inputs @ weight.T``; keeps the bytes alone for the backward."""
    return F.linear(inputs, dequantise(packed_YN, inputs.dtype))


@nf4_product.register_fake
def _(inputs: Tensor, packed_YN: Tensor) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], packed_YN.shape[0]))


@torch.library.custom_op("solvent::nf4_product_backward", mutates_args=())
def _nf4_product_backward(grad: Tensor, packed_YN: Tensor) -> Tensor:
    return grad @ dequantise(packed_YN, grad.dtype)


@_nf4_product_backward.register_fake
def _(grad: Tensor, packed_YN: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], read_row_format(packed_YN.shape[1])[0]))


def _keep_bytes(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _nf4_product_backward(grad, *ctx.saved_tensors), None


nf4_product.register_autograd(_backward, setup_context=_keep_bytes)
NF4_PRODUCT = torch.ops.solvent.nf4_product.default


def dequantise(packed_YN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers weight_YX that the bytes stand for, rounded to a type once."""
    run = _compile_dequantise() if packed_YN.device.type == "cuda" else _dequantise
    with torch.no_grad():  # else evaluation has kernels of its own
        return run(packed_YN, _get_codebook(packed_YN.device), dtype)


def _dequantise(packed_YN: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    num_columns, scales = read_row_format(packed_YN.shape[1])
    halves, tail = packed_YN[:, : num_columns // 2], packed_YN[:, num_columns // 2 :]
    scale = tail[:, :-4].float() * _read_fp32(tail[:, -4:]) if scales == "uint8" else _read_fp32(tail)
    codes = torch.stack((halves >> 4, halves & 15), dim=-1).flatten(1)
    return (codebook[codes.int()].unflatten(1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(1).to(dtype)


def _read_fp32(bytes_YN: Tensor) -> Tensor:
    """Return bytes as numbers; of a copy, which begins where numbers may."""
    return bytes_YN.clone(memory_format=torch.contiguous_format).view(torch.float32)


@cache
def _compile_dequantise() -> Any:
    """Return one kernel for the whole of it: else each of its operations would pass over memory.

    A model has matrices of four or five shapes, and each shape a kernel of its own.
    """
    return torch.compile(_dequantise, dynamic=False)


@cache
def _get_codebook(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)
