import pytest

from elastic.ports import Progress
from elastic.training.metrics import build_row, get_memory_gib, get_mfu, get_peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_found_by_the_name_that_cuda_gives(name, tera):
    assert get_peak_flops(name) == (None if tera is None else tera * 1e12)


def test_mfu_agrees_with_a_run_that_others_measured():
    # torchtitan, 1.5 B Llama shape on one H200: 55.4k tokens/s were .505 of 989 TF, so 9.02 GFLOP per token
    assert get_mfu(55_400, 9.02e9, 989.4e12) == pytest.approx(0.505, abs=1e-3)
    assert get_mfu(55_400, 9.02e9, None) is None


def test_a_row_counts_the_tokens_of_the_step_and_the_peak_of_the_world():
    row = build_row(
        Progress(step=3, tokens=3000),
        loss=2.0,
        grad_norm=1.0,
        lr=1e-3,
        step_s=0.5,
        step_tokens=1000,
        flops_per_token=1e9,
        peak_flops_per_gpu=1e12,
        world_size=4,
        attempt=2,
        memory_gib=1.0,
        now_s=0.0,
    )
    contract = "step tokens loss grad_norm lr step_s tokens_per_s mfu world_size attempt time_utc memory_gib"
    assert set(row) == set(contract.split())
    assert row["tokens_per_s"] == 2000.0  # 1000 tokens in half a second
    assert row["mfu"] == 0.5  # 2e12 of 4e12 FLOP/s
    assert row["time_utc"] == "1970-01-01T00:00:00.000Z"


def test_memory_on_a_cpu_is_what_this_process_holds():
    class Cpu:
        type = "cpu"

    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])  # touch each page
    assert 64 / 1024 < get_memory_gib(Cpu()) < 24
