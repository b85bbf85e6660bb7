"""Large data goes to the disk without a copy in the page cache, and arrives whole wherever that is refused."""

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic import direct
from elastic.direct import read_into, write_all

MIB = 2**20


@pytest.fixture
def memory():
    """Return aligned memory like a buffer's, no two pages of it alike."""
    pages = mmap.mmap(-1, 4 * MIB)
    pages[:] = b"".join(number.to_bytes(4, "big") * 1024 for number in range(4 * MIB // 4096))
    return memoryview(pages)


def write(path, chunks):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        sizes = [write_all(descriptor, chunk) for chunk in chunks]
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sizes


def takes_direct(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def is_cached(path, start):
    """Tell whether a page of a file is in the cache; to read it, even with RWF_NOWAIT, would bring it there."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        first = ctypes.c_char.from_buffer(pages)
        state = ctypes.create_string_buffer(1)
        place = ctypes.c_void_p(ctypes.addressof(first) + start)
        assert ctypes.CDLL(None).mincore(place, ctypes.c_size_t(1), state) == 0
        del first  # or the mapping could not be closed
        return bool(state.raw[0] & 1)


def test_what_is_large_leaves_no_copy_in_the_cache_and_what_is_small_does(memory, tmp_path):
    path = tmp_path / "file"
    if not takes_direct(path):
        pytest.skip(f"the file system of {tmp_path} does all writing through the cache")
    assert write(path, [memory[: 2 * MIB + 100]]) == [2 * MIB + 100]
    assert path.read_bytes() == memory[: 2 * MIB + 100]
    write(path, [memory[: 2 * MIB + 100]])
    assert not is_cached(path, 0)
    assert not is_cached(path, 2 * MIB - 4096)
    write(path, [memory[: MIB - 4096]])
    assert is_cached(path, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 2 * MIB), st.sampled_from([0, 4096, MIB])),
            st.one_of(st.integers(0, 2 * MIB), st.sampled_from([0, 4096, MIB, MIB + 512, 2 * MIB])),
        ),
        max_size=5,
    )
)
@pytest.mark.parametrize("folder", [None, "/dev/shm"])
def test_any_pieces_arrive_whole_and_in_order(tmp_path_factory, folder, pieces):
    if folder and not Path(folder).is_dir():
        pytest.skip(f"there is no {folder} here")
    path = Path(folder or tmp_path_factory.getbasetemp()) / f"solvent-test-direct-{os.getpid()}"
    pages = mmap.mmap(-1, 4 * MIB)
    pages[: 4 * MIB : 4093] = bytes(index % 251 for index in range(len(range(0, 4 * MIB, 4093))))
    chunks = [memoryview(pages)[start : start + size] for start, size in pieces]
    try:
        assert write(path, chunks) == [len(chunk) for chunk in chunks]
        assert path.read_bytes() == b"".join(chunks)
    finally:
        path.unlink(missing_ok=True)


def test_a_refusal_of_the_file_system_costs_nothing_but_the_cache(memory, tmp_path, monkeypatch):
    path = tmp_path / "file"
    if not takes_direct(path):
        pytest.skip(f"the file system of {tmp_path} does all writing through the cache")
    monkeypatch.setattr(direct, "_ALIGNED_BYTES", 1)  # this asks for what the kernel refuses
    refused = []
    real_write = os.write

    def watch(descriptor, data):
        try:
            return real_write(descriptor, data)
        except OSError as error:
            refused.append(error.errno)
            raise

    monkeypatch.setattr(os, "write", watch)
    assert write(path, [memory[1 : 2 * MIB], memory[: 2 * MIB]]) == [2 * MIB - 1, 2 * MIB]
    assert refused == [errno.EINVAL, errno.EINVAL]
    assert path.read_bytes() == bytes(memory[1 : 2 * MIB]) + bytes(memory[: 2 * MIB])


def test_what_may_not_be_written_to_is_written_through_the_cache(tmp_path):
    data = os.urandom(2 * MIB)
    assert write(tmp_path / "file", [data, bytearray(data)]) == [2 * MIB, 2 * MIB]
    assert (tmp_path / "file").read_bytes() == 2 * data


def test_a_disk_that_is_full_is_told(memory):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left") as failure:
            write_all(descriptor, memory)
        assert failure.value.errno == errno.ENOSPC
    finally:
        os.close(descriptor)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4 * MIB + 9), st.integers(0, 3 * MIB))
def test_what_is_read_directly_is_what_is_there_wherever_it_begins_and_ends(offset, size):
    path = Path("read.bin")
    if not path.exists():
        path.write_bytes(b"".join(number.to_bytes(4, "big") for number in range(MIB)) + b"end")
    out = bytearray(size)
    with path.open("rb", buffering=0) as file:
        done = read_into(file.fileno(), offset, memoryview(out))
        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT
    expected = path.read_bytes()[offset : offset + size]
    assert bytes(out[:done]) == expected


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
