"""What every file of `elastic/models` and `elastic/strategies` must keep to; a new one is picked up unasked."""

from dataclasses import replace

import pytest
import torch

from elastic import plugins
from elastic.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from elastic.ports import WorldSpec
from elastic.step import build_trainable, eval_loss, train_step
from elastic.world import close_world, open_store, open_world

MODEL = ModelConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=32)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("kind", plugins.get_names("elastic.models"))
def test_a_model_counts_its_own_parameters_and_returns_logits(kind, tied_head):
    config = replace(MODEL, kind=kind, tied_head=tied_head)
    module = plugins.load("elastic.models", kind, key="model.kind")
    model = module.build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == module.num_params(config)
    assert model(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, config.vocab_size)
    assert len(list(model.get_submodule("blocks").children())) == config.num_layers
    assert module.flops_per_token(config, 5) >= 6 * module.num_params(config) * 0.5


@pytest.mark.parametrize(
    "options", [{"head_dim": 6, "qk_norm": True}, {"qkv_bias": True}, {"no_rope_layer_interval": 2}]
)
@pytest.mark.parametrize("kind", plugins.get_names("elastic.models"))
def test_a_model_keeps_to_the_options_of_the_configuration(kind, options):
    """An option that a kind passed over would train another model than the one that was asked for."""
    config = replace(MODEL, kind=kind, **options)
    module = plugins.load("elastic.models", kind, key="model.kind")
    model, plain = module.build(config), module.build(replace(MODEL, kind=kind))
    assert sum(parameter.numel() for parameter in model.parameters()) == module.num_params(config)
    if model.state_dict().keys() == plain.state_dict().keys():
        model.load_state_dict(plain.state_dict())
        tokens_BS = torch.arange(10).reshape(2, 5)
        assert not torch.equal(model(tokens_BS), plain(tokens_BS))


@pytest.mark.parametrize("kind", plugins.get_names("elastic.strategies"))
def test_a_strategy_lowers_the_loss_of_what_it_trains_on(kind):
    config = RunConfig(
        strategy=kind, device="cpu", model=MODEL, data=DataConfig(seq_len=8), train=TrainConfig(global_batch=4)
    )
    store = open_store("127.0.0.1", timeout_s=10)
    spec = WorldSpec(
        rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, store_host=store.host, store_port=store.port
    )
    world = open_world(spec, device="cpu", timeout_s=10, store=store)
    trainable = build_trainable(config, world)
    tokens_BS = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = [(tokens_BS[:, :-1], tokens_BS[:, 1:])]
    before = eval_loss(trainable, batch, world)
    for _ in range(10):
        train_step(trainable, batch, lr=0.01, max_grad_norm=1.0, world=world)
    after = eval_loss(trainable, batch, world)
    del trainable
    close_world(world)
    assert after < before - 0.5


@pytest.mark.parametrize("kind", plugins.get_names("elastic.strategies"))
def test_what_a_strategy_says_of_its_worlds_can_be_read_without_torch(kind):
    module = plugins.load("elastic.strategies", kind, key="strategy")
    key = plugins.read_constant("elastic.strategies", kind, "WORLD_SIZE_MULTIPLE_OF")
    most = plugins.read_constant("elastic.strategies", kind, "MAX_WORLD_SIZE")
    sharded_over = plugins.read_constant("elastic.strategies", kind, "SHARDED_OVER")
    assert (key, most) == (getattr(module, "WORLD_SIZE_MULTIPLE_OF", None), getattr(module, "MAX_WORLD_SIZE", None))
    assert sharded_over == getattr(module, "SHARDED_OVER", None)
    assert sharded_over in (None, "world", "group")
    assert key is None or isinstance(getattr(RunConfig(), key), int)
    assert most is None or most >= 1
