import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.format import read_plan
from elastic.checkpoint.format.manifest import Chunk, FileRecord, TensorRecord
from elastic.checkpoint.format.read_plan import find_runs, plan_checks, plan_reads
from elastic.checkpoint.format.sharding import Box
from elastic.checkpoint.format.sources import DamageError, read_verified


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(read_plan, "BLOCK_BYTES", 16)


@st.composite
def boxes(draw, shape):
    edges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))


def at(box):
    return tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))


def cut(values, box):
    return values[at(box)]


@given(st.data())
def test_runs_copy_what_two_boxes_have_in_common_and_nothing_else(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    saved, wanted = data.draw(boxes(shape)), data.draw(boxes(shape))
    whole = np.arange(1, 1 + int(np.prod(shape, dtype=int))).reshape(shape)
    source, target = cut(whole, saved).reshape(-1), np.zeros(wanted.shape, dtype=int).reshape(-1)
    for run in find_runs(saved, wanted):
        assert (target[run.target : run.target + run.num_elements] == 0).all()
        target[run.target : run.target + run.num_elements] = source[run.source : run.source + run.num_elements]
    inside = np.zeros(shape, dtype=bool)
    inside[at(saved)] = True
    assert (target.reshape(wanted.shape) == cut(np.where(inside, whole, 0), wanted)).all()


def test_rows_that_follow_each_other_are_one_run():
    assert len(list(find_runs(Box((0, 0, 0), (8, 4, 5)), Box((2, 0, 0), (3, 4, 5))))) == 1
    assert len(list(find_runs(Box((0, 0), (8, 4)), Box((2, 1), (3, 3))))) == 3


class Files:
    """Shard files in memory."""

    name = "memory"

    def __init__(self, files):
        self.files = files
        self.num_bytes = 0

    def get_files(self):
        return self.files.keys()

    def get_view(self, file, offset, num_bytes):
        """Return None: it must be read."""

    def read_into(self, file, offset, out):
        self.num_bytes += out.nbytes
        out[:] = self.files[file][offset : offset + out.nbytes]


def save(values, edges):
    """Cut a 2-d tensor into rows, one file each, behind a header of 4 bytes."""
    files, chunks = {}, []
    for i, (first, stop) in enumerate(pairwise(edges)):
        data = np.ascontiguousarray(values[first:stop]).tobytes()
        files[f"f{i}"] = b"head" + data
        crc32 = tuple(zlib.crc32(data[j : j + 16]) for j in range(0, len(data), 16))
        chunks.append(
            Chunk(
                file=f"f{i}",
                offset=4,
                num_bytes=len(data),
                start=(first, 0),
                shape=(stop - first, values.shape[1]),
                crc32=crc32,
            )
        )
    return Files(files), {"w": TensorRecord(dtype="F32", shape=values.shape, chunks=tuple(chunks))}


@settings(max_examples=200)
@given(st.data())
def test_a_rank_gets_its_part_however_the_state_was_cut(data):
    num_rows, num_columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    values = np.arange(num_rows * num_columns, dtype=np.float32).reshape(num_rows, num_columns)
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, num_rows), max_size=3)) | {num_rows})]
    source, index = save(values, edges)
    wanted = data.draw(boxes(values.shape).filter(lambda box: all(box.shape)))
    planned, gaps = plan_reads(index, {"w": wanted, "unheld": None}, max_bytes=data.draw(st.sampled_from([16, 48])))
    assert gaps == []
    target = np.full(wanted.num_elements, -1, dtype=np.float32)
    for read in planned:
        out = bytearray(read.num_bytes)
        read_verified(read, [source], lambda out=out: memoryview(out))
        for piece in read.pieces:
            found = np.frombuffer(out, np.float32, piece.num_elements, piece.start)
            assert (target[piece.target : piece.target + piece.num_elements] == -1).all()
            target[piece.target : piece.target + piece.num_elements] = found
    assert (target.reshape(wanted.shape) == cut(values, wanted)).all()


def test_little_more_is_read_than_is_needed():
    values = np.zeros((100, 4), dtype=np.float32)  # 16 bytes a row: one block
    _, index = save(values, [0, 50, 100])
    planned, _ = plan_reads(index, {"w": Box((40, 0), (20, 4))}, max_bytes=1 << 20)
    assert [(read.file, read.offset, read.num_bytes) for read in planned] == [("f0", 4 + 640, 160), ("f1", 4, 160)]


def test_a_part_that_is_in_no_file_is_named():
    _, index = save(np.zeros((8, 4), dtype=np.float32), [0, 4, 8])
    torn = {"w": TensorRecord(dtype="F32", shape=(8, 4), chunks=index["w"].chunks[:1])}
    assert plan_reads(torn, {"w": Box((2, 0), (4, 4))}, max_bytes=64)[1] == ["w"]


def test_a_damaged_block_is_taken_from_the_next_source_or_named():
    good, index = save(np.ones((8, 4), dtype=np.float32), [0, 8])
    bad = Files({"f0": bytes(len(good.files["f0"]))})
    (read,), _ = plan_reads(index, {"w": Box((0, 0), (8, 4))}, max_bytes=1 << 20)
    out = bytearray(read.num_bytes)
    assert read_verified(read, [bad, good], lambda: memoryview(out)) == out
    assert out == good.files["f0"][4:]
    with pytest.raises(DamageError, match=r"f0 \(w\): the checksum does not fit"):
        read_verified(read, [bad], lambda: memoryview(out))
    with pytest.raises(DamageError, match="f0 is nowhere"):
        read_verified(read, [Files({})], lambda: memoryview(out))


def test_what_is_in_memory_is_verified_and_taken_where_it_is():
    class Mapped(Files):
        def get_view(self, file, offset, num_bytes):
            return memoryview(self.files[file])[offset : offset + num_bytes]

    good, index = save(np.ones((8, 4), dtype=np.float32), [0, 8])
    (read,), _ = plan_reads(index, {"w": Box((0, 0), (8, 4))}, max_bytes=1 << 20)
    found = read_verified(read, [Mapped(good.files)], lambda: pytest.fail("nothing is copied"))
    assert found.obj is good.files["f0"]
    assert found == good.files["f0"][4:]
    bad = Mapped({"f0": bytes(len(good.files["f0"]))})
    out = bytearray(read.num_bytes)
    assert read_verified(read, [bad, good], lambda: memoryview(out)) == good.files["f0"][4:]


def test_every_byte_of_a_file_is_checked_by_somebody():
    source, index = save(np.arange(24, dtype=np.float32).reshape(6, 4), [0, 6])
    record = FileRecord(size_bytes=100, header_bytes=4, header_crc32=zlib.crc32(b"head"))
    for i in range(len(source.files["f0"])):
        data = bytearray(source.files["f0"])
        data[i] ^= 1
        with pytest.raises(DamageError, match="header" if i < 4 else "w"):
            for read in plan_checks(index, {"f0": record}, max_bytes=32):
                out = memoryview(bytearray(read.num_bytes))
                read_verified(read, [Files({"f0": data})], lambda out=out: out)
