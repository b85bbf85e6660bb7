"""Rows of a matrix to the bytes of `elastic/nf4.py`, and back. No torch here."""

import numpy as np
import numpy.typing as npt

from elastic.nf4 import BLOCK, CODEBOOK, MAX_SHARE, Scales, read_row_format

_CODES = np.array(CODEBOOK, np.float32)
_BORDERS = (_CODES[1:] + _CODES[:-1]) / 2


def quantise(rows: npt.NDArray[np.float32], scales: Scales) -> npt.NDArray[np.uint8]:
    """Return the bytes of each row of a matrix.

    Raises:
        ValueError: a number is not finite.
    """
    blocks = rows.reshape(len(rows), rows.shape[1] // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("a weight is not finite")
    if scales == "uint8":  # rounded up: nothing is cut off
        steps = (largest.max(axis=-1, keepdims=True) / np.float32(MAX_SHARE)).astype("<f4")
        shares = np.ceil(largest / np.where(steps > 0, steps, 1)).clip(0, MAX_SHARE).astype(np.uint8)
        largest, tail = shares * steps, np.concatenate([shares, steps.view(np.uint8)], axis=-1)
    else:
        tail = largest.astype("<f4").view(np.uint8)
    shares_of_scale = blocks / np.where(largest > 0, largest, 1)[..., None]
    codes = np.zeros(blocks.shape, np.uint8)
    for border in _BORDERS:  # a fourth of the time of searchsorted
        codes += shares_of_scale > border
    pairs = codes.reshape(len(rows), rows.shape[1] // 2, 2)
    halves = np.bitwise_or(np.left_shift(pairs[..., 0], 4), pairs[..., 1], dtype=np.uint8)
    return np.concatenate([halves, tail], axis=-1)


def dequantise(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the numbers that the bytes of rows stand for; `elastic/nn/nf4_product.py` has the same for tensors."""
    num_columns, scales = read_row_format(packed.shape[-1])
    halves, tail = packed[:, : num_columns // 2], packed[:, num_columns // 2 :]
    if scales == "uint8":
        scale = tail[:, :-4] * np.ascontiguousarray(tail[:, -4:]).view("<f4")
    else:
        scale = np.ascontiguousarray(tail).view("<f4")
    codes = np.stack([halves >> 4, halves & 15], axis=-1).reshape(len(packed), num_columns // BLOCK, BLOCK)
    return (_CODES[codes] * scale[..., None]).reshape(len(packed), num_columns)
