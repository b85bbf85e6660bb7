"""Precisions are refused where they would be emulated; only fp16 scales its loss."""

import pytest
import torch

from elastic.precision import autocast, build_policy, build_scaler, check_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cpu_takes_every_precision_and_products_are_done_in_it(precision):
    check_precision(precision, CPU)
    with autocast(precision, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == build_policy(precision).param_dtype
    assert build_policy(precision).reduce_dtype == torch.float32


def test_only_fp16_scales_the_loss():
    assert [build_scaler(precision, CPU).is_enabled() for precision in ("fp32", "bf16", "fp16")] == [False, False, True]
