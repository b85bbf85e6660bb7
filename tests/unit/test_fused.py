"""The operations around joined products compute what the plain layers compute, forward and backward."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from elastic.models.llama import Config as ModelConfig
from elastic.nn.fused import split_and_rotate, swiglu_down
from elastic.nn.layers import build_rope_tables, rotate


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def test_swiglu_and_its_product():
    joined, weight, grad = draw(2, 3, 16), draw(5, 8), draw(2, 3, 5).detach()
    gate, up = joined.chunk(2, dim=-1)
    wanted = F.linear(F.silu(gate) * up, weight)
    product = swiglu_down(joined, weight)
    torch.testing.assert_close(product, wanted)
    inputs = (joined, weight)
    torch.testing.assert_close(torch.autograd.grad(product, inputs, grad), torch.autograd.grad(wanted, inputs, grad))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(4, 2, 6), (3, 3, 8)])
def test_rotation_of_parts(num_heads, num_kv_heads, size):
    config = ModelConfig(dim=num_heads * size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=size)
    tables = build_rope_tables(config.rope, torch.arange(5, device="cpu"))
    joined = draw(2, 5, (num_heads + 2 * num_kv_heads) * size)
    query, key, value = joined.unflatten(-1, (-1, size)).split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    turned = (rotate(part.transpose(1, 2), *tables).transpose(1, 2) for part in (query, key))
    wanted = (*turned, value)
    parts = split_and_rotate(joined, *tables, num_heads, num_kv_heads)
    torch.testing.assert_close(parts, wanted)
    grads = [draw(*part.shape).detach() for part in parts]
    torch.testing.assert_close(torch.autograd.grad(parts, joined, grads), torch.autograd.grad(wanted, joined, grads))


def test_torch_knows_the_operations():
    """Shapes without values, gradients and no hidden changes of inputs: what compilation relies on."""
    torch.library.opcheck(swiglu_down, (draw(2, 3, 16), draw(5, 8)))
    tables = build_rope_tables(ModelConfig(dim=16, num_heads=2, num_kv_heads=1).rope, torch.arange(5, device="cpu"))
    torch.library.opcheck(split_and_rotate, (draw(2, 5, 32), *tables, 2, 1))
