"""Seconds of a step, beside those that were measured on H200 and H100 (torch 2.11, 2026-11)."""

import pytest

from cluster.catalog.gpus import SPECS, get_spec
from cluster.planner.throughput import estimate_step
from elastic.errors import ConfigError
from tests.unit._planned import plan_config

MEASURED = [  # GPU, model, batch, sequence, ranks of one node, options, ms
    ("H200", "1.5B", 4, 4096, 1, {}, 248.5),
    ("H200", "1.5B", 16, 1024, 1, {}, 225.9),
    ("H200", "1.5B", 1, 16384, 1, {}, 338.7),
    ("H200", "1.5B", 4, 4096, 1, {"precision": "fp8"}, 230.9),
    ("H200", "3B", 2, 8192, 1, {}, 685.7),
    ("H200", "3B", 2, 8192, 1, {"precision": "fp8"}, 579.4),
    ("H200", "3B", 2, 8192, 1, {"strategy": "fsdp2"}, 740.8),
    ("H200", "3B", 1, 4096, 1, {"recompute": "full"}, 223.5),
    ("H200", "125M", 8, 1024, 1, {}, 17.3),
    ("H200", "8B", 1, 8192, 2, {"strategy": "fsdp2", "recompute": "full"}, 1038.6),
    ("H200", "3B", 2, 8192, 2, {"strategy": "fsdp2"}, 768.7),
    ("H200", "1.5B", 4, 4096, 2, {"strategy": "fsdp2"}, 282.0),
    ("H200", "1.5B", 1, 4096, 1, {"precision": "fp32"}, 839.1),
    ("H200", "1.5B", 1, 4096, 1, {"precision": "tf32", "strategy": "fsdp2"}, 256.2),
    ("H200", "1.5B", 4, 4096, 1, {"recompute": "selective"}, 258.6),
    ("H200", "1.5B", 4, 4096, 1, {"recompute": "full"}, 308.7),
    ("H200", "1.5B", 4, 4096, 1, {"recompute": "budget"}, 288.0),
    ("H200", "1.5B", 8, 4096, 1, {"recompute": "full"}, 596.3),
    ("H200", "1.5B", 4, 4096, 1, {"compile": False}, 255.9),
    ("H200", "1.5B", 4, 4096, 1, {"strategy": "fsdp2"}, 275.9),
    ("H200", "1.5B", 4, 4096, 1, {"strategy": "fsdp2", "recompute": "selective"}, 278.4),
    ("H200", "1.5B", 4, 4096, 1, {"strategy": "fsdp2", "compile": False}, 310.4),
    ("H200", "1.5B", 4, 4096, 1, {"strategy": "fsdp2", "compile": False, "recompute": "full"}, 379.8),
    ("H200", "1.5B", 2, 4096, 1, {"strategy": "ddp"}, 149.1),
    ("H200", "3B", 2, 8192, 1, {"strategy": "fsdp2", "recompute": "full"}, 915.0),
    ("H200", "125M", 32, 1024, 1, {"strategy": "fsdp2"}, 65.4),
    ("H200", "125M", 32, 1024, 1, {"strategy": "ddp"}, 65.2),
    ("H100", "1B", 4, 4096, 1, {"strategy": "fsdp2"}, 256.5),
    ("H100", "1B", 4, 4096, 1, {"strategy": "fsdp2", "recompute": "selective"}, 261.1),
    ("H100", "1B", 4, 4096, 1, {"strategy": "fsdp2", "recompute": "full"}, 305.9),
    ("H100", "1B", 4, 4096, 1, {"strategy": "fsdp2", "compile": False}, 299.5),
]


@pytest.mark.parametrize(("gpu", "model", "batch", "seq_len", "ranks", "options", "ms"), MEASURED)
def test_a_step_takes_what_was_measured(gpu, model, batch, seq_len, ranks, options, ms):  # noqa: PLR0917 (a row)
    config = plan_config(model, batch=batch, seq_len=seq_len, world_size=ranks, **options)
    step = estimate_step(config, get_spec(gpu), world_size=ranks, gpus_per_node=ranks)
    assert 1e3 * step.step_s == pytest.approx(ms, rel=0.10)


def test_steps_that_nothing_was_fitted_to_come_out_as_well():
    """A row left out is within 10 %, all of a size within 30 %."""
    from tests.cross_check_plans import leave_out_steps  # it reads the rows from here

    assert max(abs(error) for _, error in leave_out_steps(MEASURED.index)) < 0.10
    assert max(abs(error) for _, error in leave_out_steps(lambda row: row[1])) < 0.30


@pytest.mark.parametrize("gpu", SPECS)
def test_no_gpu_is_planned_beyond_its_peak(gpu):
    spec = get_spec(gpu)
    config = plan_config("1B", precision="bf16" if spec.capability >= (8, 0) else "fp16")
    step = estimate_step(config, spec, world_size=1)
    flops = config.model.flops_per_token(4096) * 4 * 4096
    assert 0.05 < flops / step.step_s / spec.bf16_flops < 0.75


def test_arithmetic_that_a_gpu_has_not_is_refused():
    with pytest.raises(ConfigError, match="a V100 has no such arithmetic"):
        estimate_step(plan_config(precision="bf16"), get_spec("V100"), world_size=1)


def test_a_slow_network_is_felt_and_a_fast_one_hardly():
    """8 B over two nodes of 8: 64 GB pass a node's network in each step; 10 Gbit/s take a minute for it."""
    config = plan_config("8B", batch=1, seq_len=8192, world_size=16, strategy="fsdp2", recompute="full")
    slow, fast = (
        estimate_step(config, get_spec("H100"), world_size=16, gpus_per_node=8, network_gbits=gbits).step_s
        for gbits in (10, 3200)
    )
    assert slow > 50
    assert fast < 1.3


def test_ranks_of_a_node_are_held_up_by_what_they_exchange():
    """3 B on two H200: 14.4 GB over NVLink, 40 ms, of which the kernels beside it feel 0.7."""
    config = plan_config("3B", batch=2, seq_len=8192, world_size=2, strategy="fsdp2")
    step = estimate_step(config, get_spec("H200"), world_size=2, gpus_per_node=2)
    assert step.exposed_s == pytest.approx(0.7 * 8 * config.model.num_params / 2 / (0.8 * 450e9))


def test_what_was_measured_here_scales_the_step():
    config = plan_config()
    plain, scaled = (estimate_step(config, get_spec("H200"), world_size=1, scale=scale) for scale in (1.0, 1.2))
    assert scaled.step_s == pytest.approx(1.2 * plain.step_s)


def test_steps_of_more_ranks_have_fewer_microbatches():
    config = plan_config(batch=1, microbatches=64, cluster={"max_workers": 8})
    times = [estimate_step(config, get_spec("H200"), world_size=n, gpus_per_node=8) for n in (1, 2, 4, 8)]
    assert [time.num_microbatches for time in times] == [64, 32, 16, 8]
    assert sorted((time.step_s for time in times), reverse=True) == [time.step_s for time in times]
