"""What every file of `elastic/models` and `elastic/strategies` must keep to; a new one is picked up unasked."""

import subprocess
import sys
import typing
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from elastic import plugins
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.errors import ConfigError
from elastic.model_config import ModelConfig, build_model_config, get_config_class
from elastic.nn.layers import init_weights
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, eval_loss, train_step
from elastic.world import close_world, open_store, open_world

FAMILIES = plugins.get_names("elastic.models")
KNOBS = [
    (kind, each.name)
    for kind in FAMILIES
    for each in fields(get_config_class(kind))
    if each.name not in ("kind", "max_positions")  # which file it is, and how long the data may be
]
STRATEGIES = [
    pytest.param(
        kind,
        marks=[
            pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"),
            pytest.mark.filterwarnings("default"),  # DeepSpeed's own, at its import
        ],
    )
    if kind == "deepspeed"
    else kind
    for kind in plugins.get_names("elastic.strategies")
]
TOKENS_BS = torch.arange(32).reshape(2, 16)


def small(kind: str) -> ModelConfig:
    """Return a family's defaults, with what is large in them made small."""
    config = replace(build_model_config(kind=kind), num_layers=2, vocab_size=32)
    for each in fields(config):
        value = getattr(config, each.name)
        if type(value) is int and value > 64:
            with suppress(ConfigError):
                config = replace(config, **{each.name: value // 8})
    return config


def vary(config: ModelConfig, name: str) -> list[ModelConfig]:
    """Return the configurations with other values of one knob that may be."""
    value = getattr(config, name)
    candidates = [*typing.get_args(typing.get_type_hints(type(config))[name])]
    if isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, int):
        candidates = [value * 2, value // 2, value + 2]
    elif isinstance(value, float):
        candidates = [value * 2, value / 2, value + 0.5]
    varied = []
    for candidate in candidates:
        try:
            varied.append(replace(config, **{name: candidate}))
        except ConfigError:
            continue
    return [each for each in varied if each != config]


def build(config: ModelConfig) -> torch.nn.Module:
    return plugins.load("elastic.models", config.kind, key="model.kind").build(config)


@cache
def get_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(config).state_dict().items()}


@cache
def compute(config: ModelConfig) -> torch.Tensor:
    model = build(config)
    init_weights(model, seed=0, std=config.init_std)
    with torch.no_grad():
        return model(TOKENS_BS)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_configured_without_torch_and_under_the_name_of_its_file(kind):
    code = (
        "import sys; from elastic.model_config import build_model_config;"
        f"config = build_model_config(kind={kind!r});"
        "print(config.kind, type(config)().kind, config.num_params > 0, config.flops_per_token(16) > 0,"
        "{'torch', 'numpy', 'omegaconf'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == f"{kind} {kind} True True set()\n"


@pytest.mark.parametrize(("kind", "knob"), KNOBS)
def test_a_model_counts_its_own_parameters_whatever_its_options(kind, knob):
    for config in (small(kind), *vary(small(kind), knob)):
        assert config.num_params == sum(shape.numel() for shape in get_shapes(config).values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_returns_logits_or_their_loss_and_has_its_layers_in_blocks(kind):
    config = small(kind)
    model = build(config)
    init_weights(model, seed=0, std=config.init_std)
    logits_BSV = model(TOKENS_BS)
    assert logits_BSV.shape == (*TOKENS_BS.shape, config.vocab_size)
    nats = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), TOKENS_BS.flatten(), reduction="sum")
    torch.testing.assert_close(model(TOKENS_BS, TOKENS_BS), nats)
    assert len(list(model.get_submodule("blocks").children())) == config.num_layers
    assert config.num_matrix_params <= config.num_params
    assert config.flops_per_token(5) >= 6 * config.num_matrix_params


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_position_of_a_model_sees_no_later_token(kind):
    model = build(small(kind))
    init_weights(model, seed=0, std=0.1)
    changed_BS = TOKENS_BS.clone()
    changed_BS[:, 9:] = 31 - changed_BS[:, 9:]
    with torch.no_grad():
        before, after = model(TOKENS_BS), model(changed_BS)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.equal(after[:, 9:], before[:, 9:])


@pytest.mark.parametrize(("kind", "knob"), KNOBS)
def test_a_knob_that_changes_the_shapes_of_the_weights_is_marked_as_shape(kind, knob):
    """Without the mark a run would go on with another value until its weights do not fit."""
    config = small(kind)
    changes = any(get_shapes(other) != get_shapes(config) for other in vary(config, knob))
    assert f"model.{knob}" in config.get_shape_keys() or not changes


@pytest.mark.parametrize(("kind", "knob"), KNOBS)
def test_a_model_keeps_to_the_options_of_the_configuration(kind, knob):
    """An option that a kind passed over would train another model than the one that was asked for."""
    config = small(kind)
    others = {each.name for each in fields(config)} - {each.name for each in fields(ModelConfig)} - {knob}
    bases = (config, *(base for name in others for base in vary(config, name)))  # it may matter only beside another
    assert any(
        get_shapes(other) != get_shapes(base) or not torch.equal(compute(other), compute(base))
        for base in bases
        for other in vary(base, knob)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_strategy_lowers_the_loss_of_what_it_trains_on(kind, family):
    data, training = DataConfig(seq_len=8), TrainConfig(global_batch=4)
    config = RunConfig(strategy=kind, device="cpu", model=small(family), data=data, train=training)
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
    refused = plugins.read_constant("elastic.strategies", kind, "CANNOT")
    assert refused == getattr(module, "CANNOT", None)
    for key, values in (refused or {}).items():
        for value in values:
            with pytest.raises(ConfigError, match=f"strategy={kind} cannot do {key}={value}"):
                replace(RunConfig(strategy=kind), **{key: value})
