"""States that go from device to device: rows of ranks that leave, and what the ranks of a new world lack.

The devices are the host's memory and the back end is gloo; what is sent, to whom and what is believed is the same.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from elastic.checkpoint.format.manifest import Chunk as SavedChunk
from elastic.checkpoint.format.manifest import TensorRecord
from elastic.checkpoint.format.read_plan import plan_checks, plan_reads
from elastic.checkpoint.format.sharding import Box, Entry, Spread, build_layout, get_box, plan_chunks
from elastic.checkpoint.restore.device_exchange import fill_from_devices
from elastic.checkpoint.staging.device_cache import Rows
from elastic.checkpoint.tiers import device as module
from elastic.checkpoint.tiers.device import Offer, list_chunks, take_over
from tests.distributed._spawn_ckpt import run_ranks

CPU = torch.device("cpu")
SHAPES = {"w": (7, 640), "v": (12, 5, 64), "b": (9,), "step": ()}
WHOLE = {name: torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).float() for name, shape in SHAPES.items()}


def spread_over(num_ranks):
    """Return how the state lies on ranks that shard it by rows."""
    return {
        name: Spread(
            shape=shape,
            dtype="F32",
            mesh_shape=(num_ranks,),
            ranks=tuple(range(num_ranks)),
            sharded_dims=(0 if shape else None,),
        )
        for name, shape in SHAPES.items()
    }


def cut(tensor, box):
    for dim, (first, size) in enumerate(zip(box.start, box.shape, strict=True)):
        tensor = tensor.narrow(dim, first, size)
    return tensor.contiguous()


def save(num_ranks):
    """Return the records of a state that so many ranks have saved, and each one's file as rows on its device."""
    spreads = spread_over(num_ranks)
    dtypes = dict.fromkeys(SHAPES, "F32")
    layouts = [build_layout(boxes, dtypes) for boxes in plan_chunks(spreads, world_size=num_ranks)]
    records = {
        name: TensorRecord(
            dtype="F32",
            shape=shape,
            chunks=tuple(
                SavedChunk(
                    file=f"f{rank}",
                    offset=entry.offset,
                    num_bytes=entry.num_bytes,
                    start=entry.box.start,
                    shape=entry.box.shape,
                    crc32=(),
                )
                for rank, layout in enumerate(layouts)
                if (entry := layout.entries.get(name))
            ),
        )
        for name, shape in SHAPES.items()
    }
    rows = [
        Rows(
            f"f{rank}",
            {
                name: (entry.offset, cut(WHOLE[name], entry.box).view(-1).view(torch.uint8))
                for name, entry in layout.entries.items()
            },
        )
        for rank, layout in enumerate(layouts)
    ]
    return records, rows


def want(records, rank, num_ranks):
    """Return the reads of a rank, its tensors as rows of elements, and what shall be in them."""
    boxes = {name: get_box(spread, rank) for name, spread in spread_over(num_ranks).items()}
    reads, gaps = plan_reads(records, boxes, max_bytes=2**20)
    assert not gaps
    boxes = {name: box for name, box in boxes.items() if box is not None}
    targets = {name: torch.full((box.num_elements,), -1.0) for name, box in boxes.items()}
    return reads, targets, {name: cut(WHOLE[name], box).view(-1) for name, box in boxes.items()}


def restore_resharded(_folder, num_before, holders):
    """Restore what `num_before` ranks have saved, where `holders` says which of their files this rank has."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    records, rows = save(num_before)
    reads, targets, expected = want(records, rank, num_ranks)
    checks = plan_checks(records, {}, max_bytes=2**20)
    left = fill_from_devices([*reads, *checks], targets, [rows[n] for n in holders[rank]], device=CPU)
    assert [read for read in left if not read.pieces] == checks, "what verifies files is not done with this"
    for read in left:  # as another source would
        for piece in read.pieces:
            (found,) = [each for each in rows if each.file == read.file]
            data = found.get(piece.name, read.offset + piece.start, 4 * piece.num_elements).view(torch.float32)
            targets[piece.name][piece.target : piece.target + piece.num_elements] = data
    assert all(torch.equal(targets[name], expected[name]) for name in expected)
    return {read.file for read in left if read.pieces}


@pytest.mark.parametrize(
    ("num_before", "holders"),
    [
        pytest.param(2, [(0,), (1,), ()], id="two grow to three"),
        pytest.param(1, [(), (0,), ()], id="one grows to three, and is not the first"),
        pytest.param(5, [(0, 3), (1,), (2, 4)], id="five shrink to three, which took over what left"),
        pytest.param(3, [(0, 1, 2), (0, 1, 2), (0, 1, 2)], id="all have all"),
    ],
)
def test_what_the_ranks_of_a_world_lack_comes_from_the_devices_of_the_others(tmp_path, num_before, holders):
    for files in run_ranks(restore_resharded, 3, tmp_path, num_before, holders):
        assert not files


def test_what_no_device_has_is_left_to_be_read(tmp_path):
    for files in run_ranks(restore_resharded, 2, tmp_path, 3, [(0,), (1,)]):
        assert files == {"f2"}


def offer_of(rows, *, leaves, room_bytes=2**40):
    """Return the offer of a rank, and the copy that it speaks of."""
    places, stop = {}, 0
    for name, (_, chunk) in rows.chunks.items():
        places[name] = stop
        stop += -(-len(chunk) // 512) * 512
    memory = torch.zeros(stop, dtype=torch.uint8)
    for name, (_, chunk) in rows.chunks.items():
        memory[places[name] : places[name] + len(chunk)] = chunk
    entries = {
        name: Entry(offset=offset, num_bytes=len(chunk), dtype="F32", box=Box((), ()))
        for name, (offset, chunk) in rows.chunks.items()
    }
    chunks = list_chunks(entries, places)
    offer = Offer(leaves=leaves, room_bytes=room_bytes, file=rows.file, num_bytes=stop, chunks=chunks)
    return offer, memory


def hand_over(_folder, leavers, room_bytes, is_aborted):
    """Hand the parts of ranks that leave to the others; return what this one has got, and what it makes of it."""
    rank = dist.get_rank()
    _, rows = save(dist.get_world_size())
    offer, memory = offer_of(rows[rank], leaves=rank in leavers, room_bytes=room_bytes)
    if is_aborted:  # collectives end without an error, and nothing has come
        module.dist.batch_isend_irecv = lambda _ops: []
    taken = take_over(offer, memory, device=CPU, votes=dist.group.WORLD)
    for got in taken.rows:
        giver = rows[int(got.file[1:])]
        for name, (offset, chunk) in got.chunks.items():
            assert offset == giver.chunks[name][0]
            assert torch.equal(chunk, giver.chunks[name][1]), name
    return taken.is_whole, {(got.file, name) for got in taken.rows for name in got.chunks}


@pytest.mark.parametrize("leavers", [(1,), (0, 2), ()], ids=["one leaves", "two leave", "nobody leaves"])
def test_those_that_stay_have_all_of_those_that_leave_once(tmp_path, leavers):
    results = run_ranks(hand_over, 4, tmp_path, leavers, 2**40, False)
    _, rows = save(4)
    expected = {(f"f{rank}", name) for rank in leavers for name in rows[rank].chunks}
    assert all(is_whole for is_whole, _ in results)
    assert set().union(*(got for _, got in results)) == expected
    assert sum(len(got) for _, got in results) == len(expected), "nothing is sent twice"
    assert not any(results[rank][1] for rank in leavers)


def test_without_room_nothing_is_sent(tmp_path):
    assert run_ranks(hand_over, 3, tmp_path, (0,), 100, False) == [(False, set())] * 3


def test_where_nobody_stays_nothing_is_sent(tmp_path):
    assert run_ranks(hand_over, 2, tmp_path, (0, 1), 2**40, False) == [(False, set())] * 2


def test_what_an_abort_kept_from_coming_is_not_believed(tmp_path):
    assert run_ranks(hand_over, 3, tmp_path, (2,), 2**40, True) == [(False, set())] * 3


def test_the_fingerprint_of_a_part_tells_other_bytes_and_another_order():
    part = torch.randint(256, (3 * 2**20 + 512,), dtype=torch.uint8)
    blocks = part[: 3 * 2**20].view(3, 2**20)
    seen = {module.get_fingerprint(part)}
    for one, other in pairwise(range(3)):
        swapped = part.clone()
        swapped[: 3 * 2**20].view(3, 2**20)[[one, other]] = blocks[[other, one]]
        seen.add(module.get_fingerprint(swapped))
    for at in (0, 2**20 + 5, len(part) - 1):
        changed = part.clone()
        changed[at] += 1
        seen.add(module.get_fingerprint(changed))
    assert len(seen) == 6
