"""Frozen weights in 4 bits: NF4 in blocks of 64, as QLoRA defines it. Neither torch nor numpy here.

Each row of a matrix stands for itself: a run of bytes with its codes, two to a byte (the first in the upper half), and
then its scales. So a matrix is one tensor of bytes that may be cut between any two rows, and its numbers are the same
on any number of ranks. Scales are fp32, one a block; or a byte a block, times an fp32 number of the row (double
quantisation: half a bit a weight becomes an eighth).

The numbers are packed when a model is imported (`checkpoint/hf/four_bits.py`) and unpacked for each product
(`nf4_product.py`).

Source: QLoRA, arXiv:2305.14314, appendix E. There double quantisation goes by 256 blocks, wherever rows end.
"""

from typing import Literal

Scales = Literal["uint8", "fp32"]

BLOCK = 64
"""Weights that share a scale."""
CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the codes 0 to 15 stand for, as shares of a block's scale."""
MAX_SHARE = 255
"""The byte of a block whose scale is the largest of its row."""


def count_row_bytes(num_columns: int, scales: Scales) -> int:
    """Return the bytes of a row; its columns are a multiple of `BLOCK`."""
    assert num_columns % BLOCK == 0, "elastic/tuning.py refuses such matrices"
    num_blocks = num_columns // BLOCK
    return num_columns // 2 + (num_blocks + 4 if scales == "uint8" else 4 * num_blocks)


def read_row_format(row_bytes: int) -> tuple[int, Scales]:
    """Return the columns and the kind of scales of rows of so many bytes.

    A block takes 33 bytes, and a row 4 more, or a block takes 36: the remainder by 3 tells them apart.
    """
    scales: Scales = "fp32" if row_bytes % 3 == 0 else "uint8"
    num_columns = BLOCK * (row_bytes // 36 if scales == "fp32" else (row_bytes - 4) // 33)
    assert count_row_bytes(num_columns, scales) == row_bytes, f"no row of a 4-bit matrix has {row_bytes} bytes"
    return num_columns, scales
