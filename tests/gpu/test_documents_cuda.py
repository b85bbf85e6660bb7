"""Documents kept apart by the kernel for sequences of any length, against the mask that CPUs use."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from elastic.nn.attention import attend_within, separate
from elastic.nn.loss import IGNORE
from elastic.training.step import build_trainable, train_step
from tests.gpu.test_fast_step_cuda import CONFIG, draw, error, pytestmark, world  # noqa: F401 (a fixture and marks)

BORDERS = [0, 5, 100, 128, 200, 201, 256, 256, 256]  # of two sequences of 128


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_kernel_mixes_what_the_mask_lets_through(num_kv_heads):
    borders = torch.tensor(BORDERS, dtype=torch.int32, device="cuda")
    tokens = torch.zeros(2, 128, dtype=torch.int64, device="cuda")
    positions, kept = separate(borders, tokens, torch.bfloat16)
    _, mask = separate(borders, tokens, torch.float32)
    assert kept is borders and mask.dtype == torch.bool
    assert positions.flatten().tolist() == [n for low, high in pairwise(BORDERS) for n in range(high - low)]
    inputs = [draw(2, 128, heads, 64) for heads in (4, num_kv_heads, num_kv_heads)]
    turned = [part.transpose(1, 2) for part in inputs]
    found = attend_within(*turned, borders)
    wanted = attend_within(*(part.float() for part in turned), mask)
    grad = torch.randn_like(found)
    assert error(found, wanted) < 0.01
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad.float()), strict=True
    ):
        assert error(one, other) < 0.02


def make_batches(num_steps):
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1000, (4, 129), generator=generator)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        labels[0, 100:] = IGNORE
        inner = torch.randint(1, 512, (3 + 3 * step,), generator=generator).tolist()
        starts = sorted({0, 128, 256, 384, *inner})
        borders = torch.tensor(starts + [512] * (64 - len(starts)), dtype=torch.int32)
        yield tokens.cuda(), labels.cuda(), borders.cuda()


def train(config, world):  # noqa: F811 (the fixture)
    trainable = build_trainable(replace(config, data=replace(config.data, packing="documents")), world)
    return [train_step(trainable, [batch], lr=1e-3, max_grad_norm=1.0, world=world).loss for batch in make_batches(4)]


@pytest.mark.parametrize("changes", [{}, {"recompute": "selective"}, {"recompute": "full"}, {"strategy": "fsdp2"}])
def test_a_compiled_model_trains_as_the_plain_one_in_fp32(world, changes):  # noqa: F811
    fast = train(replace(CONFIG, **changes), world)
    exact = train(replace(CONFIG, precision="fp32", compile=False), world)
    assert fast == pytest.approx(exact, rel=3e-3)


def test_another_number_of_documents_compiles_nothing_anew(world):  # noqa: F811
    trainable = build_trainable(replace(CONFIG, data=replace(CONFIG.data, packing="documents")), world)
    counts = []
    for tokens, labels, borders in make_batches(4):
        for size in (64, 128):
            more = torch.full((size - 64,), 512, dtype=torch.int32, device="cuda")
            batch = (tokens, labels, torch.cat([borders, more]))
            train_step(trainable, [batch], lr=1e-3, max_grad_norm=1.0, world=world)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[0]
