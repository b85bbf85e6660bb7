"""The loss is a sum of nats over the positions that count."""

import math

import torch

from elastic.loss import IGNORE, sum_cross_entropy


def test_equal_logits_cost_log_of_the_vocabulary_per_target():
    labels = torch.tensor([[0, IGNORE, 7], [3, 2, IGNORE]])
    nats = sum_cross_entropy(torch.zeros(2, 3, 10, dtype=torch.bfloat16), labels)
    assert nats.dtype == torch.float32
    assert math.isclose(nats.item(), 4 * math.log(10), rel_tol=1e-6)


def test_a_batch_without_targets_costs_nothing_and_has_no_gradient():
    logits = torch.randn(2, 3, 10, requires_grad=True)
    nats = sum_cross_entropy(logits, torch.full((2, 3), IGNORE))
    nats.backward()
    assert nats.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 3, 10))
