# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# (Triton is installed with CUDA builds of torch alone, and a kernel is not Python)
"""Cut queries, keys and values out of one product and turn the first two by their position; and back.

Letters: B batch, S sequence, X all heads' sizes, H query heads, K key/value heads, E size of one head.
"""

import triton
import triton.language as tl
from torch import Tensor


def split_and_rotate(
    joined_BSX: Tensor, cos_SE: Tensor, sin_SE: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query_BSHE, key_BSKE and value_BSKE."""
    batch, seq_len, _ = joined_BSX.shape
    size = cos_SE.shape[-1]
    query = joined_BSX.new_empty((batch, seq_len, num_heads, size))
    key, value = (joined_BSX.new_empty((batch, seq_len, num_kv_heads, size)) for _ in range(2))
    _launch(joined_BSX, query, key, value, cos_SE, sin_SE, backward=False)
    return query, key, value


def join_rotated(query: Tensor, key: Tensor, value: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Return the gradient of joined_BSX for those of query_BSHE, key_BSKE and value_BSKE."""
    num_heads = query.shape[2] + 2 * key.shape[2]
    joined_BSX = query.new_empty((*query.shape[:2], num_heads * query.shape[3]))
    _launch(joined_BSX, query, key, value, cos_SE, sin_SE, backward=True)
    return joined_BSX


def _launch(
    joined: Tensor, query: Tensor, key: Tensor, value: Tensor, cos_SE: Tensor, sin_SE: Tensor, *, backward: bool
) -> None:
    batch, seq_len, num_heads, size = query.shape
    num_kv_heads = key.shape[2]
    assert all(tensor.is_contiguous() for tensor in (joined, query, key, value, cos_SE, sin_SE))
    _rotate_kernel[(batch * seq_len,)](
        *(joined, query, key, value, cos_SE, sin_SE, cos_SE.shape[:-1].numel()),  # the tables' rows: S, or B * S
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        SIZE=size,
        BACKWARD=backward,
        BLOCK_HEADS=triton.next_power_of_2(num_heads + 2 * num_kv_heads),
        BLOCK_HALF=triton.next_power_of_2(size // 2),
    )


@triton.jit
def _rotate_kernel(
    joined, query, key, value, cos, sin, num_angles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program per position, all heads at once; element i of a head is turned with element SIZE / 2 + i."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    halves = tl.arange(0, BLOCK_HALF)[None, :]
    HALF: tl.constexpr = SIZE // 2
    is_inside = (heads < HEADS + 2 * KV_HEADS) & (halves < HALF)
    is_query = is_inside & (heads < HEADS)
    is_key = is_inside & (heads >= HEADS) & (heads < HEADS + KV_HEADS)
    is_value = is_inside & (heads >= HEADS + KV_HEADS)
    angle = (row % num_angles) * SIZE + halves
    turn_cos = tl.load(cos + angle, mask=halves < HALF, other=0.0)
    turn_sin = tl.load(sin + angle, mask=halves < HALF, other=0.0)
    whole = joined + row * (HEADS + 2 * KV_HEADS) * SIZE + heads * SIZE + halves
    queries = query + row * HEADS * SIZE + heads * SIZE + halves
    keys = key + row * KV_HEADS * SIZE + (heads - HEADS) * SIZE + halves
    values = value + row * KV_HEADS * SIZE + (heads - HEADS - KV_HEADS) * SIZE + halves
    kind = joined.dtype.element_ty
    if BACKWARD:
        left = tl.load(queries, mask=is_query, other=0.0).to(tl.float32)
        left += tl.load(keys, mask=is_key, other=0.0).to(tl.float32)
        left += tl.load(values, mask=is_value, other=0.0).to(tl.float32)
        right = tl.load(queries + HALF, mask=is_query, other=0.0).to(tl.float32)
        right += tl.load(keys + HALF, mask=is_key, other=0.0).to(tl.float32)
        right += tl.load(values + HALF, mask=is_value, other=0.0).to(tl.float32)
        turned_left = tl.where(is_value, left, left * turn_cos + right * turn_sin)
        turned_right = tl.where(is_value, right, right * turn_cos - left * turn_sin)
        tl.store(whole, turned_left.to(kind), mask=is_inside)
        tl.store(whole + HALF, turned_right.to(kind), mask=is_inside)
    else:
        left = tl.load(whole, mask=is_inside, other=0.0).to(tl.float32)
        right = tl.load(whole + HALF, mask=is_inside, other=0.0).to(tl.float32)
        turned_left = (left * turn_cos - right * turn_sin).to(kind)
        turned_right = (right * turn_cos + left * turn_sin).to(kind)
        tl.store(queries, turned_left, mask=is_query)
        tl.store(queries + HALF, turned_right, mask=is_query)
        tl.store(keys, turned_left, mask=is_key)
        tl.store(keys + HALF, turned_right, mask=is_key)
        tl.store(values, left.to(kind), mask=is_value)
        tl.store(values + HALF, right.to(kind), mask=is_value)
