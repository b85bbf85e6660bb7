"""The model computes what its configuration says, and its arithmetic agrees with torch's own counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastic.models.llama import Config as ModelConfig
from elastic.models.llama import build
from elastic.nn.layers import build_rope_tables, init_weights, rotate

SMALL = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=61)
UNTIED = ModelConfig(dim=32, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=40, vocab_size=61, tied_head=False)
QWEN2 = replace(SMALL, qkv_bias=True)
QWEN3 = replace(SMALL, qk_norm=True, head_dim=12)
SHAPES = pytest.mark.parametrize(
    "config", [SMALL, UNTIED, QWEN2, QWEN3], ids=["tied", "untied", "with biases", "normalised heads of another size"]
)


def ready(config, seed=0):
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu")
    init_weights(model, seed=seed, std=config.init_std)
    return model


@SHAPES
def test_parameters_are_counted_right(config):
    with torch.device("meta"):
        model = build(config)
    assert config.num_params == sum(param.numel() for param in model.parameters())


@SHAPES
def test_flops_agree_with_torch_s_counter(config):
    with torch.device("meta"):
        model, tokens = build(config), torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    # backward is twice the forward
    assert config.flops_per_token(16) * 3 * 16 == 3 * counter.get_total_flops()


@SHAPES
def test_nothing_but_parameters_is_in_the_state(config):
    model = ready(config)
    assert [name for name, _ in model.named_buffers()] == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_position_does_not_see_later_tokens():
    model = ready(SMALL)
    tokens = torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=0)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 0


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    cos_SE, sin_SE = build_rope_tables(replace(SMALL, rope_theta=100.0).rope, torch.arange(32, device="cpu"))
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    queries, keys = (rotate(vector.expand(1, 1, 32, 8), cos_SE, sin_SE)[0, 0] for vector in (query, key))
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(32))
    scores = queries @ keys.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert scores[0].std() > 0.1


def test_a_layer_without_positions_sees_a_set_and_not_a_sequence():
    tokens, shuffled = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[1, 4, 3, 5, 1, 9]])
    one_layer = replace(SMALL, num_layers=1, init_std=0.2)
    last_without, last_with = (
        [ready(replace(one_layer, no_rope_layer_interval=interval))(ids)[:, -1] for ids in (tokens, shuffled)]
        for interval in (1, 2)
    )
    torch.testing.assert_close(*last_without)
    assert (last_with[0] - last_with[1]).abs().max() > 1e-3


def test_scaling_leaves_fast_rotations_alone_and_slows_down_slow_ones():
    config = replace(SMALL, head_dim=64, rope_theta=500_000.0)
    scaled = replace(config, rope_scaling_factor=8.0)
    (plain_cos, plain_sin), (cos, sin) = (
        build_rope_tables(c.rope, torch.arange(2, device="cpu")) for c in (config, scaled)
    )
    ratio = torch.atan2(plain_sin[1], plain_cos[1]) / torch.atan2(sin[1], cos[1])
    assert ratio[0].item() == pytest.approx(1)  # 1304 turns over 8192 positions: more than 4
    assert ratio[31].item() == pytest.approx(8)  # 0.004 turns: less than 1
    assert ratio[:32].diff().min() > -1e-3


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped = ready(SMALL)
    whole = ready(ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=48, vocab_size=61))
    state = grouped.state_dict()
    for name in state:
        if ".key." in name or ".value." in name:  # heads of size 8: each serves two neighbouring query heads
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    tokens = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(whole(tokens), grouped(tokens))


def test_init_has_the_wished_scale():
    config = ModelConfig(dim=128, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=256, vocab_size=512)
    weights = dict(ready(config).named_parameters())
    # std / sqrt(N) for the N = 4 layers that write into the residual stream; 16384 draws: 0.6 % standard error
    assert weights["blocks.0.attention.query.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert weights["blocks.1.attention.output.weight"].std().item() == pytest.approx(0.01, rel=0.03)
    assert weights["blocks.1.ffn.down.weight"].std().item() == pytest.approx(0.01, rel=0.03)
    assert (weights["norm.weight"] == 1).all()


def test_init_depends_on_the_seed_and_on_the_name_alone():
    one, again, other = (
        dict(ready(config, seed).named_parameters()) for config, seed in ((SMALL, 3), (SMALL, 3), (SMALL, 4))
    )
    deeper = dict(ready(ModelConfig(**{**SMALL.__dict__, "num_layers": 3}), seed=3).named_parameters())
    name = "blocks.1.attention.query.weight"
    assert torch.equal(one[name], again[name])
    assert torch.equal(one[name], deeper[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["blocks.0.attention.query.weight"])
