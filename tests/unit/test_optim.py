"""The learning rate is a pure function of tokens; norms are not decayed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import OptimConfig
from elastic.models.llama import Config as ModelConfig
from elastic.models.llama import build
from elastic.optim.adamw import AdamW
from elastic.optim.lr_schedule import learning_rate

TOTAL = st.integers(min_value=10, max_value=10**13)
SHARE = st.floats(min_value=0.0, max_value=1.0)


@st.composite
def schedules(draw):
    total = draw(TOTAL)
    schedule = draw(st.sampled_from(["cosine", "wsd"]))
    config = OptimConfig(
        lr=draw(st.floats(min_value=1e-6, max_value=1.0)),
        min_lr_ratio=draw(SHARE),
        schedule=schedule,
        decay_shape=draw(st.sampled_from(["linear", "sqrt"])),
        warmup_tokens=int(total * draw(SHARE)),
        decay_tokens=int(total * draw(SHARE)) if schedule == "wsd" else 0,
    )
    return config, total


@given(schedules(), SHARE)
def test_rate_is_between_zero_and_its_peak(schedule, share):
    config, total = schedule
    assert 0.0 <= learning_rate(config, int(total * share), total) <= config.lr * (1 + 1e-9)


@given(schedules(), SHARE, SHARE)
def test_rate_rises_before_the_end_of_warm_up_and_never_after(schedule, one, other):
    config, total = schedule
    early, late = sorted((int(total * one), int(total * other)))
    before, after = learning_rate(config, early, total), learning_rate(config, late, total)
    if late < config.warmup_tokens:
        assert before <= after
    elif early >= config.warmup_tokens:
        assert before >= after


@given(schedules())
def test_rate_ends_at_its_minimum_and_stays_there(schedule):
    config, total = schedule
    assert learning_rate(config, total, total) == pytest.approx(config.lr * config.min_lr_ratio)
    assert learning_rate(config, 2 * total, total) == learning_rate(config, total, total)


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        # cosine from 100 to 900: half-way, (1 + cos(pi / 2)) / 2 = 1/2
        (OptimConfig(lr=1.0, min_lr_ratio=0.0, warmup_tokens=100), {50: 0.5, 100: 1.0, 500: 0.5, 900: 0.0}),
        # wsd: the last fifth of 900 is 720 to 900; a quarter of it is 765
        (
            OptimConfig(lr=1.0, min_lr_ratio=0.2, schedule="wsd", warmup_tokens=100),
            {50: 0.5, 100: 1.0, 720: 1.0, 765: 0.2 + 0.8 * 0.75, 900: 0.2},
        ),
        (
            OptimConfig(lr=1.0, min_lr_ratio=0.0, schedule="wsd", decay_tokens=400, decay_shape="sqrt"),
            {1: 1.0, 500: 1.0, 600: 0.5, 900: 0.0},
        ),
    ],
    ids=["cosine", "wsd-linear", "wsd-sqrt"],
)
def test_rate_at_chosen_tokens(config, rates):
    assert {tokens: learning_rate(config, tokens, 900) for tokens in rates} == pytest.approx(rates)


def test_matrices_are_decayed_and_norms_are_not():
    model = build(ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8, vocab_size=16))
    decayed, plain = AdamW(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) == 8  # embedding, 4 of attention, 3 of feed-forward
    assert {param.ndim for param in decayed["params"]} == {2}
    assert len(plain["params"]) == 3
    assert isinstance(plain["params"][0], torch.nn.Parameter)


def test_run_that_is_shorter_than_its_warm_up_keeps_warming_up():
    config = OptimConfig(lr=1.0, warmup_tokens=1000)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)
