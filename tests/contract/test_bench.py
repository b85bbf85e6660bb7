"""`solvent bench` measures what it says, and says it so that programs can read it."""

import json
import subprocess
import sys

import pytest

VERB = [sys.executable, "-c", "from cluster.cli import enter; enter()", "bench"]
TINY = """
device: cpu
model: {dim: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 32, vocab_size: 64}
data: {seq_len: 16}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def test_ceilings_and_a_sweep_as_json(config, tmp_path):
    sweep = ["--micro-batches", "1", "4", "--seq-lens", "8", "16", "--steps", "3"]
    done = subprocess.run(
        [*VERB, config, "precision=bf16", *sweep, "--storage", str(tmp_path), "--json"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ceilings = found["ceilings"]
    assert ceilings["dtype"] == "bfloat16"
    assert all(value > 0 for name, value in ceilings.items() if "per_s" in name)
    shapes = [(step["seq_len"], step["micro_batch"]) for step in found["steps"]]
    assert shapes == [(8, 1), (8, 4), (16, 1), (16, 4)]
    for step in found["steps"]:
        assert step["tokens_per_s"] == pytest.approx(step["seq_len"] * step["micro_batch"] / step["step_ms"] * 1e3)
        # one matrix product of this device: more than its ceiling would be a wrong count
        assert 0 < step["share_of_products"] < 1
        assert step["share_of_products"] == pytest.approx(step["tflops_per_s"] / ceilings["products_tflops_per_s"])
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}, "a file was left behind"


def test_what_cannot_be_measured_returns_2(config):
    done = subprocess.run([*VERB, config, "attention=cudnn"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "attention=cudnn needs a GPU" in done.stderr
