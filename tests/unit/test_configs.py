"""The configurations that ship: they load, their names are true, and their headers follow from them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos.faults import load_faults
from cluster.planner.memory import estimate_memory
from elastic.config_load import load
from elastic.models.llama import Config as ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("faults-"))
TUNED = [name for name in NAMES if name.startswith("sft-")]
"""Their model is that of the folder that they are imported with."""
ESTIMATED = [name for name in NAMES if name != "demo" and name not in TUNED]


_LLAMA3: dict[str, Any] = {"num_kv_heads": 8, "vocab_size": 128256}
PUBLISHED = {  # Qwen2.5-0.5B; Llama 3.2 1B and 3B; Llama 3.1 8B
    "0.5": ModelConfig(
        **{"dim": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "ffn_dim": 4864, "vocab_size": 151936},
        qkv_bias=True,
    ),
    "1": ModelConfig(dim=2048, num_layers=16, num_heads=32, ffn_dim=8192, **_LLAMA3),
    "3": ModelConfig(dim=3072, num_layers=28, num_heads=24, ffn_dim=8192, **_LLAMA3),
    "8": ModelConfig(dim=4096, num_layers=32, num_heads=32, ffn_dim=14336, tied_head=False, **_LLAMA3),
}


def count_parameters(model: ModelConfig):
    """Weights of a Llama: per layer q, k, v, o, three of SwiGLU and two norms; then embedding, head and a last norm."""
    kv_dim = model.dim // model.num_heads * model.num_kv_heads
    attention = 2 * model.dim**2 + 2 * model.dim * kv_dim
    layer = attention + 3 * model.dim * model.ffn_dim + 2 * model.dim
    embeddings = model.vocab_size * model.dim * (1 if model.tied_head else 2)
    return model.num_layers * layer + embeddings + model.dim


def read_header(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    rows = re.findall(r"^# {3}(\S+) .*= ([\d,.e]*\d)", text, re.MULTILINE)
    return {key: float(value.replace(",", "")) for key, value in rows}


def test_the_configurations_are_those_promised():
    tuning = ["sft-full-24gb", "sft-lora-24gb", "sft-qlora-24gb"]
    assert ["1.5b-8x24gb-spot", "125m-24gb", "8b-8xh100-spot", "demo", "llama2-70b-2t", *tuning] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_called_like_its_file(name):
    assert load(CONFIGS / f"{name}.yaml").run == name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("125m-24gb", 125e6), ("1.5b-8x24gb-spot", 1.5e9), ("8b-8xh100-spot", 8e9), ("llama2-70b-2t", 69e9)],
)
def test_the_name_tells_the_number_of_parameters(name, parameters):
    assert count_parameters(load(CONFIGS / f"{name}.yaml").model) == pytest.approx(parameters, rel=0.02)


def test_llama2_70b_is_the_published_shape():
    """68,976,648,192 parameters: the sum over the tensors of meta-llama/Llama-2-70b-hf (137.95 GB in 16 bits)."""
    assert count_parameters(load(CONFIGS / "llama2-70b-2t.yaml").model) == 68_976_648_192


def test_the_demo_has_at_least_5_million_parameters():
    assert count_parameters(load(CONFIGS / "demo.yaml").model) == 5_475_584


@pytest.mark.parametrize("name", NAMES)
def test_every_world_size_can_share_the_global_batch(name):
    config = load(CONFIGS / f"{name}.yaml")
    assert config.train.global_batch % config.cluster.max_workers == 0


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_header_restates_the_configuration(name):
    config, header = load(CONFIGS / f"{name}.yaml"), read_header(name)
    assert header["N"] == count_parameters(config.model)
    assert header["D"] == config.total_tokens
    assert header["GPUs"] == config.cluster.max_workers
    assert header["price"] == config.cost.usd_per_gpu_hour


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_header_follows_from_its_formula(name):
    header = read_header(name)
    tokens_per_s = header["GPUs"] * header["peak"] * header["MFU"] / (6 * header["N"])
    hours = header["D"] / tokens_per_s / 3600
    assert header["tokens/s"] == pytest.approx(tokens_per_s, rel=0.005)  # three digits are written
    assert header["hours"] == pytest.approx(hours, rel=0.005)
    assert header["USD"] == pytest.approx(hours * header["GPUs"] * header["price"], rel=0.005)


@pytest.mark.parametrize("name", ESTIMATED)
def test_an_estimate_is_marked_as_one(name):
    assert "# ESTIMATE, not measured" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", TUNED)
def test_a_plan_predicts_the_memory_of_tuning_that_the_header_promises(name):
    config, text = load(CONFIGS / f"{name}.yaml"), (CONFIGS / f"{name}.yaml").read_text()
    assert config.data.packing == "documents" and config.cluster.max_workers == 1
    promised = re.findall(
        r"([\d.]+) B ([\d.]+) GiB", next(line for line in text.splitlines() if "NOT MEASURED" in line)
    )
    assert promised
    for size, gib in promised:
        peak_gib = estimate_memory(replace(config, model=PUBLISHED[size]), world_size=1).peak_gib
        assert peak_gib == pytest.approx(float(gib), abs=0.06) and peak_gib < 22


def test_the_faults_that_ship_can_strike_the_demo():
    config = load(CONFIGS / "demo.yaml")
    num_nodes = config.cluster.max_workers
    limits = {"num_steps": config.train.steps, "num_nodes": num_nodes, "max_workers": num_nodes, "seed": 0}
    assert len(load_faults(CONFIGS / "faults-demo.yaml", **limits)) == 6
