"""What a model makes of a row of several documents: of each what it makes of it alone."""

from dataclasses import replace

import pytest
import torch

from elastic.models.llama import Config, build
from elastic.nn.attention import separate
from elastic.nn.layers import init_weights
from elastic.nn.loss import IGNORE
from elastic.nn.recompute import set_recompute

CONFIG = Config(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, init_std=0.3)
BORDERS = torch.tensor([0, 5, 16, 18, 32, 32, 32], dtype=torch.int32)  # two rows of 16


@pytest.fixture
def model():
    with torch.device("meta"):
        model = build(CONFIG)
    model.to_empty(device="cpu")
    init_weights(model, seed=1, std=0.3)
    return model


def draw(seed=0):
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))


def test_a_neighbour_document_has_no_influence_on_logits(model):
    tokens = draw()
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 7) % 64
    changed[1, 2:] = (changed[1, 2:] + 7) % 64
    before, after = model(tokens, borders_N=BORDERS), model(changed, borders_N=BORDERS)
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1, :2], after[1, :2])
    assert (before[0, :5] != after[0, :5]).any()
    plain = model(changed)[0, 5:] - model(tokens)[0, 5:]
    assert plain.abs().amax() > 0.01  # without borders there is one


def test_a_document_in_a_row_has_the_logits_that_it_has_alone(model):
    tokens = draw()
    packed = model(tokens, borders_N=BORDERS).flatten(0, 1)
    for start, end in ((0, 5), (5, 16), (16, 18), (18, 32)):
        alone = model(tokens.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)


def test_packed_documents_teach_what_they_teach_unpacked(model):
    tokens, labels = draw(), draw(1)
    labels[0, 3] = IGNORE
    nats = model(tokens, labels, BORDERS)
    packed = torch.autograd.grad(nats, list(model.parameters()))
    flat, parts = tokens.flatten(), []
    for start, end in ((0, 5), (5, 16), (16, 18), (18, 32)):
        parts.append(model(flat[None, start:end], labels.flatten()[None, start:end]))
    alone = torch.autograd.grad(sum(parts), list(model.parameters()))
    torch.testing.assert_close(nats, sum(parts))
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_positions_begin_anew_with_each_document():
    positions, _ = separate(BORDERS, draw(), torch.float32)
    assert positions.flatten().tolist() == [*range(5), *range(11), *range(2), *range(14)]


def test_one_document_per_row_is_what_a_row_is_without_borders(model):
    whole = torch.tensor([0, 16, 32, 32], dtype=torch.int32)
    torch.testing.assert_close(model(draw(), borders_N=whole), model(draw()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(model, recompute):
    plain = torch.autograd.grad(model(draw(), draw(1), BORDERS), list(model.parameters()))
    for block in model.blocks:
        set_recompute(block, recompute)
    again = torch.autograd.grad(model(draw(), draw(1), BORDERS), list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


def test_layers_without_positions_and_norms_of_heads_are_kept_apart_too():
    with torch.device("meta"):
        model = build(replace(CONFIG, qk_norm=True, no_rope_layer_interval=2))
    model.to_empty(device="cpu")
    init_weights(model, seed=1, std=0.3)
    test_a_document_in_a_row_has_the_logits_that_it_has_alone(model)
