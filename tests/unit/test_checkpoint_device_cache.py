"""What a snapshot has left on a device; that the allocator finds the same memory again needs a GPU (`tests/gpu`)."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.format.manifest import Chunk, TensorRecord
from elastic.checkpoint.format.read_plan import plan_checks, plan_reads
from elastic.checkpoint.format.sharding import Box, build_layout
from elastic.checkpoint.restore.device_exchange import fill_from_devices
from elastic.checkpoint.staging import device_cache
from elastic.checkpoint.staging.device_cache import BLOCK_BYTES, Resident
from elastic.checkpoint.staging.device_to_host import plan_clones

NUM_COLUMNS = 3


def leave(tensors, layout, names):
    """Copy chunks to one stretch of memory, as a snapshot does on a device."""
    sizes = {name: layout.entries[name].num_bytes for name in names}
    places, num_bytes = plan_clones(sizes, budget_bytes=1 << 40)
    memory = torch.empty(max(1, -(-num_bytes // BLOCK_BYTES)) * BLOCK_BYTES, dtype=torch.uint8)
    for name, place in places.items():
        memory[place : place + sizes[name]] = cut(tensors[name], layout.entries[name].box).reshape(-1).view(torch.uint8)
    return Resident(layout, memory, places), memory


def cut(tensor, box):
    return tensor[box.start[0] : box.start[0] + box.shape[0]].contiguous()


def rows_of(tensor, first, stop):
    return Box((first, 0), (stop - first, tensor.shape[1]))


@pytest.fixture(scope="module", autouse=True)
def _group():
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@given(st.data())
def test_rows_that_are_left_are_taken_and_the_others_are_read(data):
    num_rows = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    types = st.sampled_from([torch.float32, torch.bfloat16])
    names = [f"t{i}" for i in range(len(num_rows))]
    tensors = {
        name: torch.arange(1, 1 + n * NUM_COLUMNS).reshape(n, NUM_COLUMNS).to(data.draw(types))
        for name, n in zip(names, num_rows, strict=True)
    }
    dtypes = {name: {torch.float32: "F32", torch.bfloat16: "BF16"}[t.dtype] for name, t in tensors.items()}
    edge = {name: data.draw(st.integers(0, len(t))) for name, t in tensors.items()}
    parts = [
        {name: rows_of(t, 0, edge[name]) for name, t in tensors.items() if edge[name]},
        {name: rows_of(t, edge[name], len(t)) for name, t in tensors.items() if edge[name] < len(t)},
    ]
    layouts = [build_layout(boxes, dtypes) for boxes in parts]
    records = {
        name: TensorRecord(
            dtype=dtypes[name],
            shape=tuple(t.shape),
            chunks=tuple(
                Chunk(
                    file=f"f{i}",
                    offset=layout.entries[name].offset,
                    num_bytes=layout.entries[name].num_bytes,
                    start=layout.entries[name].box.start,
                    shape=layout.entries[name].box.shape,
                    crc32=(0,),
                )
                for i, layout in enumerate(layouts)
                if name in layout.entries
            ),
        )
        for name, t in tensors.items()
    }
    on_device = [name for name in parts[0] if data.draw(st.booleans())]
    found, memory = leave(tensors, layouts[0], on_device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_cache.torch, "empty", lambda *_, **__: memory)
        rows = found.find("f0", is_alone=True)
    assert rows is not None

    wanted = {
        name: rows_of(t, *sorted(data.draw(st.tuples(*[st.integers(0, len(t))] * 2)))) for name, t in tensors.items()
    }
    reads, gaps = plan_reads(
        records, {n: box if all(box.shape) else None for n, box in wanted.items()}, max_bytes=2**21
    )
    assert not gaps
    flat = {name: torch.zeros(box.num_elements, dtype=tensors[name].dtype) for name, box in wanted.items()}
    left = fill_from_devices(reads, flat, [rows], device=torch.device("cpu"))
    for read in reads:
        is_here = read.file == "f0" and all(piece.name in on_device for piece in read.pieces)
        assert (read in left) != is_here
        for piece in read.pieces:
            have = flat[piece.name][piece.target : piece.target + piece.num_elements]
            want = cut(tensors[piece.name], wanted[piece.name]).reshape(-1)[
                piece.target : piece.target + piece.num_elements
            ]
            assert torch.equal(have, want if is_here else torch.zeros_like(want))
    checks = plan_checks(records, {}, max_bytes=2**21)
    assert fill_from_devices(checks, flat, [rows], device=torch.device("cpu")) == checks, "files are verified"


def test_memory_that_was_put_to_another_use_is_not_taken(monkeypatch):
    tensors = {"a": torch.ones(2 * BLOCK_BYTES // 12, NUM_COLUMNS)}
    layout = build_layout({"a": rows_of(tensors["a"], 0, len(tensors["a"]))}, {"a": "F32"})
    found, memory = leave(tensors, layout, ["a"])
    monkeypatch.setattr(device_cache.torch, "empty", lambda *_, **__: memory)
    assert found.find("f0", is_alone=True) is not None
    for i in (0, BLOCK_BYTES - 1, BLOCK_BYTES, len(memory) - 1):
        memory[i] ^= 1
        assert found.find("f0", is_alone=True) is None
        memory[i] ^= 1
    memory[:BLOCK_BYTES] = 0
    assert found.find("f0", is_alone=True) is None


def test_a_device_without_room_has_nothing(monkeypatch):
    tensors = {"a": torch.ones(4, NUM_COLUMNS)}
    layout = build_layout({"a": rows_of(tensors["a"], 0, 4)}, {"a": "F32"})
    found, _ = leave(tensors, layout, ["a"])

    def refuse(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device_cache.torch, "empty", refuse)
    assert found.find("f0", is_alone=True) is None
