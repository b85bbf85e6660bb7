"""Frozen weights in 4 bits: the numbers are those of QLoRA, and rows stand for themselves."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.hf.four_bits import dequantise, quantise
from elastic.nf4 import BLOCK, CODEBOOK, count_row_bytes, read_row_format
from elastic.nn.nf4_product import _compile_dequantise, nf4_product
from elastic.nn.nf4_product import dequantise as dequantise_tensor

SCALES = ["uint8", "fp32"]
matrices = st.builds(
    lambda seed, rows, blocks, size: (
        np.random.default_rng(seed).standard_normal((rows, blocks * BLOCK)) * 10.0**size
    ).astype(np.float32),
    *(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6), st.integers(-6, 3)),
)


def test_the_codebook_has_equally_likely_shares_of_a_normal_distribution():
    """As the authors compute it: quantiles from 0.9677083 to 1/2, 8 above zero and 7 below, over the largest."""

    def quantiles(num):
        return [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, num)[:-1]]

    values = sorted([*quantiles(9), 0.0, *(-q for q in quantiles(8))])
    assert np.array(values) / max(values) == pytest.approx(CODEBOOK, abs=1e-6)


def test_bytes_are_those_of_bitsandbytes():
    """Of `quantize_4bit(x, blocksize=64, quant_type="nf4")` of bitsandbytes 0.50.2 on a CPU."""
    x = np.sin(np.arange(128, dtype=np.float32)) * np.linspace(0.1, 3, 128, dtype=np.float32)
    packed = quantise(x.reshape(1, 128), "fp32")[0]
    assert packed[:64].tobytes().hex() == (
        "78876568986458a96448bb7336bc9325bdb4139ed6117ee8115dfb202cfd4019"
        "cc7226cd9324bdb413aed6127de8215deb313bed4119ee7116efa103dfc301bf"
    )
    assert packed[64:].view("<f4") == pytest.approx([1.4423, 2.9189], abs=1e-4)


@given(matrix=matrices, scales=st.sampled_from(SCALES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_weight_is_off_by_half_a_gap_of_its_block_at_most_and_rows_may_be_cut_anywhere(matrix, scales, data):
    packed = quantise(matrix, scales)
    assert packed.shape == (len(matrix), count_row_bytes(matrix.shape[1], scales))
    assert read_row_format(packed.shape[1]) == (matrix.shape[1], scales)
    back = dequantise(packed)
    largest = np.abs(matrix.reshape(len(matrix), -1, BLOCK)).max(axis=-1)
    if scales == "uint8":  # rounded up by at most a 255th of the row's largest
        largest += largest.max(axis=-1, keepdims=True) / 255
    half_gap = max(np.diff(CODEBOOK)) / 2
    off = np.abs(back - matrix).reshape(len(matrix), -1, BLOCK).max(axis=-1)
    assert (off <= largest * half_gap * (1 + 1e-5)).all()
    if scales == "fp32":
        np.testing.assert_array_equal(quantise(back, scales), packed)
    cut = data.draw(st.integers(0, len(matrix)))
    parts = [quantise(matrix[:cut], scales), quantise(matrix[cut:], scales)]
    np.testing.assert_array_equal(np.concatenate(parts), packed)
    np.testing.assert_array_equal(dequantise_tensor(torch.from_numpy(packed), torch.float32).numpy(), back)


@pytest.mark.parametrize("scales", SCALES)
def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_is_refused(scales):
    matrix = np.zeros((3, 128), np.float32)
    matrix[1, 70] = 5
    np.testing.assert_array_equal(dequantise(quantise(matrix, scales)), matrix)
    for wrong in (np.nan, np.inf):
        matrix[2, 3] = wrong
        with pytest.raises(ValueError, match="not finite"):
            quantise(matrix, scales)


@pytest.mark.parametrize(("scales", "bytes_per_weight"), [("uint8", 0.5166), ("fp32", 0.5625)])
def test_a_weight_takes_half_a_byte_and_its_share_of_the_scales(scales, bytes_per_weight):
    assert count_row_bytes(4096, scales) / 4096 == pytest.approx(bytes_per_weight, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_unpacked_weight_and_keeps_the_bytes_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator)
    packed, inputs = torch.from_numpy(quantise(weight.numpy(), "uint8")), torch.randn(2, 5, 128, generator=generator)
    ours, theirs = (inputs.to(dtype).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        product = nf4_product(ours, packed)
    expected = theirs @ dequantise_tensor(packed, torch.float32).to(dtype).T
    torch.testing.assert_close(product, expected)
    for result in (product, expected):
        (result.float() ** 2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert [tensor.dtype for tensor in kept] == [torch.uint8]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("scales", SCALES)
def test_compiled_unpacking_as_on_a_gpu_gives_the_same_numbers_for_all_shapes_of_a_model(scales):
    codebook = torch.tensor(CODEBOOK)
    _compile_dequantise.cache_clear()
    torch.compiler.reset()
    for rows, columns in ((64, 64), (32, 64), (192, 64), (64, 192)):
        matrix = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
        packed = torch.from_numpy(quantise(matrix, scales))
        with torch.no_grad():
            unpacked = _compile_dequantise()(packed, codebook, torch.bfloat16)
        assert torch.equal(unpacked, dequantise_tensor(packed, torch.bfloat16))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch.compile's own
def test_compiled_code_keeps_no_unpacked_weight():
    generator = torch.Generator().manual_seed(0)
    packed = torch.from_numpy(quantise(torch.randn(96, 128, generator=generator).numpy(), "uint8"))
    inputs = torch.randn(5, 128, generator=generator).requires_grad_()
    kept = []
    run = torch.compile(lambda x: torch.nn.functional.silu(nf4_product(x, packed)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        product = run(inputs)
    product.sum().backward()
    assert sorted(tensor.shape for tensor in kept) == [(5, 96), packed.shape]
