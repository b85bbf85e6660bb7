"""LoRA as configuration, numbers and files: what it trains, what it costs, and which adapters of PEFT are taken."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cluster.planner.host_memory import estimate_host_gib
from cluster.planner.memory import estimate_memory
from elastic.checkpoint.hf.adapters import ADAPTER, ADAPTER_CONFIG, open_adapters, write_adapters
from elastic.checkpoint.hf.saved import MergedWeights
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.config_load import build
from elastic.errors import ConfigError, ModelFolderError
from elastic.models.llama import Config as ModelConfig
from elastic.storage import open_storage
from elastic.tuning import LoraConfig, count_frozen_bytes, get_adapter_shapes

MODEL = ModelConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=12, vocab_size=16)
LORA = LoraConfig(rank=2, alpha=3.0, targets="query,down")
SHAPES = get_adapter_shapes(MODEL, LORA)


class Counting:
    """Adapters whose numbers are a function of their name, in two pieces."""

    def read(self, name):
        numbers = np.random.default_rng(list(name.encode())).standard_normal(SHAPES[name], np.float32).reshape(-1)
        yield from (numbers[:3], numbers[3:])


class Base:
    """A weight of ones, a row at a time."""

    def read(self, name):
        for _ in range(8):
            yield np.ones(12 if "down" in name else 8, np.float32)


def test_adapters_beside_all_linear_layers_are_counted():
    # rank 2; attention: 8+8, 8+4, 8+4, 8+8; feed-forward: 8+12 three times; two layers
    config = RunConfig(model=MODEL, tune="lora", lora=LoraConfig(rank=2))
    assert config.num_trained_params == 2 * 2 * (16 + 12 + 12 + 16 + 60)
    assert RunConfig(model=MODEL).num_trained_params == MODEL.num_params


def test_frozen_weights_cost_two_thirds_of_the_flops():
    full = RunConfig(model=MODEL)
    lora = replace(full, tune="lora", lora=LoraConfig(rank=1))
    adapters = 6.0 * lora.num_trained_params
    assert full.flops_per_token - lora.flops_per_token == 2.0 * MODEL.num_matrix_params - adapters


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["tune=lora", "lora.targets=query,q_proj"], "has no linear layer 'q_proj'"),
        (["tune=lora", "precision=fp8", "compile=true"], "Set precision=bf16"),
        (["tune=lora", "lora.rank=0"], "lora.rank=0 must"),
        (["lora.rank=8"], "lora.* is read by tune=lora and qlora only"),
        (["tune=4bit"], "tune='4bit'"),
        (["tune=qlora", "model.ffn_dim=96"], "the rows of ffn.down have 96"),
        (["tune=qlora", "precision=fp8", "compile=true"], "in 4 bits. Set precision=bf16"),
        (["tune=lora", "lora.nf4_scales=fp32"], "lora.nf4_scales=fp32 is read by tune=qlora only"),
    ],
)
def test_tuning_that_cannot_work_is_refused_before_anything_is_rented(overrides, says):
    with pytest.raises(ConfigError) as error:
        build(overrides)
    assert says in str(error.value)


def test_a_scale_by_the_root_of_the_rank_is_that_of_rslora():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, scaling="sqrt_rank").scale == 2.0


def test_a_plan_counts_frozen_weights_in_16_bits_and_snapshots_of_adapters_alone():
    model = ModelConfig(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336, vocab_size=128256)
    full = RunConfig(model=model, precision="bf16", recompute="full", compile=True)
    lora = replace(full, tune="lora", lora=LoraConfig(rank=16))
    held = estimate_memory(lora, world_size=1).gib["state"]
    # 7.5 B parameters of 2 bytes; 42 M of adapters, of 12
    assert held == pytest.approx((2 * model.num_params + 12 * lora.num_trained_params) / 2**30)
    assert held < estimate_memory(full, world_size=1).gib["state"] / 6
    assert (
        estimate_host_gib(lora, world_size=1, gpus_per_node=1)
        < 16
        < estimate_host_gib(full, world_size=1, gpus_per_node=1)
    )


def test_a_plan_fits_8_b_in_4_bits_into_24_gb():
    model = ModelConfig(
        dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336, vocab_size=128256, tied_head=False
    )
    config = RunConfig(
        model=model,
        **{"precision": "bf16", "compile": True, "recompute": "full", "tune": "qlora", "lora": LoraConfig(rank=16)},
        **{"data": DataConfig(seq_len=4096), "train": TrainConfig(global_batch=16, micro_batch=1)},
    )
    in_blocks = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    frozen = count_frozen_bytes(model, config.lora, "qlora", item_bytes=2)
    assert frozen == pytest.approx(0.516 * in_blocks + 2 * (model.num_params - in_blocks), rel=2e-3)
    plan = estimate_memory(config, world_size=1)
    assert plan.gib["state"] == pytest.approx((frozen + 12 * config.num_trained_params) / 2**30)
    # a matrix is unpacked for its product: the largest of the feed-forward
    assert plan.gib["gathered"] == pytest.approx(2 * 4096 * 14336 / 2**30)
    assert plan.peak_gib < 20 < estimate_memory(replace(config, tune="lora"), world_size=1).gib["state"] + 5


def write_peft(folder, **changes):
    write_adapters(
        open_storage(folder), MODEL, LORA, Counting(), origin="org/model", files={"README.md": b"x"}, dtype="fp32"
    )
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **changes}))
    return open_storage(folder)


def test_adapters_come_back_from_the_files_of_peft_as_they_were(tmp_path):
    found = open_adapters(write_peft(tmp_path / "a"), MODEL)
    assert found.lora == LORA and found.tensors.keys() == SHAPES.keys()
    for name, tensor in found.tensors.items():
        read = b"".join(bytes(piece) for piece in found.read(tensor, piece_bytes=8))
        assert read == b"".join(piece.tobytes() for piece in Counting().read(name))
    config = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/model"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3, ["down_proj", "q_proj"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 3}, "with r=3 and this model it is [3, 8]"),
        ({"r": "many"}, "no rank and scale"),
        ({"lora_alpha": None}, "no rank and scale"),
    ],
)
def test_adapters_that_would_be_computed_differently_are_refused(changes, says, tmp_path):
    storage = write_peft(tmp_path / "a", **changes)
    with pytest.raises(ModelFolderError) as error:
        open_adapters(storage, MODEL)
    assert says in str(error.value)


def test_adapters_of_another_model_are_refused(tmp_path):
    storage = write_peft(tmp_path / "a")
    with pytest.raises(ModelFolderError, match="would be left unused"):
        open_adapters(storage, replace(MODEL, num_layers=1))
    with pytest.raises(ModelFolderError, match="it is not"):
        open_adapters(storage, replace(MODEL, num_layers=3))
    (tmp_path / "a" / ADAPTER).unlink()
    with pytest.raises(ModelFolderError, match="call save_pretrained"):
        open_adapters(storage, MODEL)


def test_merged_weights_are_the_frozen_ones_and_the_scaled_product_of_the_adapter():
    merged = MergedWeights(Base(), Counting(), MODEL, LORA)
    for layer, num_in in (("blocks.1.attention.query", 8), ("blocks.0.ffn.down", 12)):
        found = np.concatenate(list(merged.read(f"{layer}.weight"))).reshape(8, num_in)
        a, b = (np.concatenate(list(Counting().read(f"{layer}.{m}"))).astype(np.float64) for m in ("lora_a", "lora_b"))
        expected = 1 + 3.0 / 2 * b.reshape(8, 2) @ a.reshape(2, num_in)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found.dtype == np.float32
    assert np.concatenate(list(merged.read("blocks.0.attention.key.weight"))).tolist() == [1.0] * 64
