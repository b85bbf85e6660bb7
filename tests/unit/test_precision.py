"""Precisions are refused where they would be emulated; only fp16 scales its loss."""

import pytest
import torch

from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.nn.attention import choose_attention
from elastic.nn.precision import autocast, build_policy, build_scaler, check_precision, set_tf32

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_cpu_takes_every_precision_and_products_are_done_in_it(precision):
    check_precision(precision, CPU)
    with autocast(precision, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    config = RunConfig(precision=precision)
    assert product.dtype == build_policy(config).param_dtype
    assert build_policy(config).reduce_dtype == torch.float32


def test_only_fp16_scales_the_loss():
    assert [build_scaler(precision, CPU).is_enabled() for precision in ("fp32", "bf16", "fp16")] == [False, False, True]


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
def test_a_cpu_has_no_fp8(precision):
    with pytest.raises(ConfigError, match=f"precision={precision}, but a CPU has no fp8"):
        check_precision(precision, CPU)


def test_only_tf32_lets_fp32_products_round():
    for precision, allowed in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        set_tf32(precision)
        assert torch.get_float32_matmul_precision() == allowed


@pytest.mark.parametrize("attention", ["cudnn", "flash", "fa4"])
def test_a_back_end_of_attention_that_needs_a_gpu_is_refused_without_one(attention):
    with pytest.raises(ConfigError, match=f"attention={attention} needs a GPU"):
        choose_attention(RunConfig(attention=attention, precision="bf16"), CPU)
    assert choose_attention(RunConfig(precision="bf16"), CPU) == "auto"
