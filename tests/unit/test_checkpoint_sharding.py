import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.format.sharding import ITEM_BYTES, Box, Spread, build_layout, get_box, plan_chunks

DTYPES = st.sampled_from(sorted(ITEM_BYTES))


@st.composite
def spreads(draw):
    """States as strategies leave them: on one mesh of the world, cut along any dim over any axis, or alike on all."""
    mesh_shape = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3), (3, 2)]))
    world_size = math.prod(mesh_shape)
    state = {}
    for i in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        if shape and draw(st.booleans()):
            shape = (shape[0] * 2048, *shape[1:])  # large enough to be cut over replicas
        dims = st.none() if not shape else st.one_of(st.none(), st.integers(0, len(shape) - 1))
        state[f"t{i}"] = Spread(
            shape=shape,
            dtype=draw(DTYPES),
            mesh_shape=mesh_shape,
            ranks=tuple(range(world_size)),
            sharded_dims=tuple(draw(dims) for _ in mesh_shape),
        )
    return state, world_size


def cover(shape, boxes):
    """Return how often each element of a tensor is in one of the boxes."""
    import numpy as np

    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))] += 1
    return counts


@given(spreads())
def test_all_chunks_together_are_the_state_once_and_each_is_held_by_who_writes_it(state_and_world):
    state, world_size = state_and_world
    chunks = plan_chunks(state, world_size=world_size)
    for name, spread in state.items():
        boxes = [of_rank[name] for of_rank in chunks if name in of_rank]
        assert (cover(spread.shape, boxes) == 1).all()
        for rank, of_rank in enumerate(chunks):
            if name in of_rank:
                held = get_box(spread, rank)
                for a, n, b, m in zip(of_rank[name].start, of_rank[name].shape, held.start, held.shape, strict=True):
                    assert b <= a
                    assert a + n <= b + m


@pytest.mark.parametrize(("num_ranks", "size"), [(3, 4), (3, 7), (4, 4), (5, 3), (2, 1)])
def test_rows_are_cut_as_torch_cuts_them(num_ranks, size):
    import torch

    spread = Spread(
        shape=(size,), dtype="F32", mesh_shape=(num_ranks,), ranks=tuple(range(num_ranks)), sharded_dims=(0,)
    )
    boxes = [get_box(spread, rank) for rank in range(num_ranks)]
    expected = [part.tolist() for part in torch.arange(size).chunk(num_ranks)]
    assert [list(range(b.start[0], b.start[0] + b.shape[0])) for b in boxes if b] == expected


def test_what_all_ranks_hold_is_written_by_all_of_them_in_equal_parts():
    alike = {"mesh_shape": (4,), "ranks": (0, 1, 2, 3), "sharded_dims": (None,), "dtype": "F32"}
    state = {f"w{i}": Spread(shape=(1024, 33), **alike) for i in range(5)}
    state |= {f"step{i}": Spread(shape=(), **alike) for i in range(8)}
    chunks = plan_chunks(state, world_size=4)
    sizes = [sum(box.num_elements for box in of_rank.values()) for of_rank in chunks]
    assert sizes == [5 * 256 * 33 + 2] * 4  # two of the eight scalars each


def test_a_small_tensor_is_not_cut():
    spread = Spread(shape=(8, 8), dtype="F32", mesh_shape=(2,), ranks=(0, 1), sharded_dims=(None,))
    assert plan_chunks({"w": spread}, world_size=2) == [{"w": Box((0, 0), (8, 8))}, {}]


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.tuples(DTYPES, st.lists(st.integers(1, 5), max_size=3))))
def test_a_layout_is_a_safetensors_file_without_holes_and_aligned(tensors):
    boxes = {name: Box((1,) * len(shape), tuple(shape)) for name, (_, shape) in tensors.items()}
    layout = build_layout(boxes, {name: dtype for name, (dtype, _) in tensors.items()})
    length = int.from_bytes(layout.header[:8], "little")
    header = json.loads(layout.header[8:])
    start = 8 + length
    assert start == len(layout.header)
    assert start % 64 == 0
    info = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
    assert header.keys() == tensors.keys() == info.keys() == layout.entries.keys()
    end = 0
    for name, entry in sorted(layout.entries.items(), key=lambda item: item[1].offset):
        assert (
            header[name]["data_offsets"]
            == [end, end + entry.num_bytes]
            == [entry.offset - start, end + entry.num_bytes]
        )
        assert entry.offset % ITEM_BYTES[entry.dtype] == 0
        assert entry.num_bytes == math.prod(header[name]["shape"]) * ITEM_BYTES[header[name]["dtype"]]
        assert info[name]["saved_offsets"] == [1] * len(header[name]["shape"])
        end += entry.num_bytes
    assert layout.num_bytes == start + end
