"""The loss is a sum of nats over the positions that count, and its gradient is exact however it is cut."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from elastic.nn import loss
from elastic.nn.loss import IGNORE, sum_cross_entropy


def plain(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)


def test_equal_logits_cost_log_of_the_vocabulary_per_target():
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, IGNORE]])
    nats = sum_cross_entropy(
        torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.zeros(10, 4, dtype=torch.bfloat16), labels
    )
    assert nats.dtype == torch.float32
    assert math.isclose(nats.item(), 4 * math.log(10), rel_tol=1e-6)


def test_a_batch_without_targets_costs_nothing_and_has_no_gradient():
    hidden, weight = draw(2, 3, 4), draw(10, 4)
    nats = sum_cross_entropy(hidden, weight, torch.full((2, 3), IGNORE))
    nats.backward()
    assert nats.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros(2, 3, 4))
    assert torch.equal(weight.grad, torch.zeros(10, 4))


@pytest.mark.parametrize("rows_per_chunk", [6, 4, 1])
def test_value_and_gradients_are_those_of_plain_cross_entropy(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", rows_per_chunk * 10 * 4)
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, 9]])
    hidden, weight = draw(2, 3, 4), draw(10, 4)
    wanted_nats = plain(hidden, weight, labels)
    wanted = torch.autograd.grad(wanted_nats / 7, (hidden, weight))
    nats = sum_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(nats, wanted_nats)
    torch.testing.assert_close(torch.autograd.grad(nats / 7, (hidden, weight)), wanted)


@pytest.mark.parametrize("rows_per_chunk", [6, 4])
def test_a_frozen_output_layer_gets_no_gradient_and_changes_nothing_else(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", rows_per_chunk * 10 * 4)
    monkeypatch.setattr(loss, "_add_product", None)  # nor is one computed
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, 9]])
    hidden, weight = draw(2, 3, 4), draw(10, 4).detach()
    nats = sum_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(plain(hidden, weight, labels), hidden)
    torch.testing.assert_close(torch.autograd.grad(nats, hidden), wanted)


def test_without_gradients_the_value_is_the_same():
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, 9]])
    hidden, weight = draw(2, 3, 4), draw(10, 4)
    with torch.no_grad():
        torch.testing.assert_close(sum_cross_entropy(hidden, weight, labels), plain(hidden, weight, labels))


def test_under_autocast_products_are_in_low_precision_and_gradients_reach_the_fp32_weights():
    hidden, weight = draw(2, 3, 4), draw(10, 4)
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, 9]])
    with torch.autocast("cpu", torch.bfloat16):
        nats = sum_cross_entropy(hidden, weight, labels)
    low = plain(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    torch.testing.assert_close(nats, low, rtol=1e-2, atol=0)
    assert nats != plain(hidden, weight, labels)
    nats.backward()
    assert weight.grad.dtype == torch.float32
