import os

import pytest

from elastic.checkpoint.staging import shared_memory
from elastic.checkpoint.staging.shared_memory import allocate_buffer

NUM_BYTES = 1 << 20


def count_bytes(descriptor):
    return os.fstat(descriptor).st_blocks * 512


def test_memory_is_found_beforehand():
    new = allocate_buffer(NUM_BYTES, name="test")
    assert count_bytes(new.descriptor) == 0
    new.populate().join()
    assert count_bytes(new.descriptor) == NUM_BYTES
    assert new.view[:] == bytes(NUM_BYTES)
    new.close()


def test_no_memory_is_found_for_a_buffer_that_was_closed(monkeypatch):
    new = allocate_buffer(NUM_BYTES, name="test")
    monkeypatch.setattr(shared_memory, "_POPULATE_BYTES", NUM_BYTES // 4)
    monkeypatch.setattr(shared_memory, "_POPULATE_THREADS", 1)
    other = os.dup(new.descriptor)
    really = new._find

    def close_meanwhile(descriptor, view, start):
        really(descriptor, view, start)
        if start == 0:
            new.close()

    monkeypatch.setattr(new, "_find", close_meanwhile)
    new.populate().join()
    assert count_bytes(other) == NUM_BYTES // 4
    os.close(other)


def test_what_another_process_filled_is_read_without_a_map():
    new = allocate_buffer(NUM_BYTES, name="test")
    new.view[100:104] = b"abcd"
    out = bytearray(6)
    new.read_into(99, memoryview(out))
    assert out == b"\0abcd\0"
    with pytest.raises(OSError, match="ends before the shard"):
        new.read_into(NUM_BYTES - 3, memoryview(out))
    new.close()


@pytest.mark.parametrize("num_bytes", [0, -1, 2**62])
def test_a_descriptor_that_cannot_be_mapped_is_closed(num_bytes):
    descriptor = os.memfd_create("test")
    with pytest.raises((OSError, ValueError, OverflowError)):
        shared_memory.SharedBuffer(descriptor, num_bytes)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
