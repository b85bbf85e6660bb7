"""Floating-point numbers as bytes, little-endian, as safetensors files hold them; numpy has no bf16 of its own."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Dtype = Literal["F32", "F16", "BF16"]
"""As safetensors calls them."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)


def to_fp32(data: bytes | bytearray | memoryview, dtype: Dtype) -> npt.NDArray[np.float32]:
    """Return the numbers, exactly: every fp16 and bf16 number is an fp32 number."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype("<f4", copy=False)


def from_fp32(numbers: npt.NDArray[np.float32], dtype: Literal["F32", "BF16"]) -> bytes:
    """Return the bytes of the nearest numbers of a type, ties to even."""
    if dtype == "F32":
        return numbers.astype("<f4", copy=False).tobytes()
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4")
    # half of the last place that stays, less one if that place is even; a carry into the exponent is as it should be
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    quiet_nan = (bits >> 16).astype("<u2") | 0x40
    return np.where(np.isnan(numbers), quiet_nan, rounded).tobytes()
