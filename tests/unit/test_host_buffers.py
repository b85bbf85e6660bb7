"""Which memory a trainer's buffers take up, and when."""

import os
import threading

import pytest
import torch

from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.staging.shared_memory import SharedBuffer
from tests.unit.test_checkpoint_shared_memory import count_bytes

NUM_BYTES = 1 << 20
WAIT_S = 10


class Watched:
    """Two buffers, and all that is told of them."""

    def __init__(self) -> None:
        self.descriptors: dict[int, int] = {}
        self.released: list[int] = []
        self.is_asked, self.is_freed = threading.Event(), threading.Event()
        self.buffers = HostBuffers(
            torch.device("cpu"),
            count=2,
            on_allocated=self._hold,
            on_released=self.released.append,
            wait_for_freed=self._wait,
        )

    def _hold(self, index: int, buffer: SharedBuffer) -> None:
        self.descriptors[index] = os.dup(buffer.descriptor)

    def _wait(self) -> None:
        self.is_asked.set()
        assert self.is_freed.wait(WAIT_S)

    def count(self, index: int) -> int:
        return count_bytes(self.descriptors[index])

    def join(self) -> None:
        """Wait for all that goes on in the background, and for what that starts."""
        while threads := [thread for thread in threading.enumerate() if thread.name in ("free", "populate")]:
            threads[0].join(WAIT_S)
            assert not threads[0].is_alive()

    def close(self) -> None:
        self.is_freed.set()
        self.join()
        for descriptor in self.descriptors.values():
            os.close(descriptor)


@pytest.fixture
def watched():
    watched = Watched()
    yield watched
    watched.close()


def test_one_snapshot_has_memory_before_the_first_and_all_once_what_is_released_is_free(watched):
    watched.buffers.reserve(NUM_BYTES)
    watched.join()
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, 0]

    watched.buffers.release_outgrown()
    assert watched.is_asked.wait(WAIT_S)
    assert watched.count(1) == 0
    watched.is_freed.set()
    watched.join()
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, NUM_BYTES]


def test_smaller_ones_are_kept_until_the_first_of_the_larger_ones_is_filled(watched):
    watched.is_freed.set()
    watched.buffers.reserve(NUM_BYTES)
    watched.buffers.release_outgrown()
    watched.buffers.reserve(NUM_BYTES // 2)
    assert (watched.buffers.indices, watched.buffers.held_bytes) == ([0, 1], 2 * NUM_BYTES)

    watched.buffers.reserve(2 * NUM_BYTES)
    assert (watched.buffers.indices, watched.buffers.held_bytes) == ([2], 6 * NUM_BYTES)
    assert watched.released == []
    assert len(watched.buffers.get(0)) == NUM_BYTES

    watched.buffers.release_outgrown()
    watched.join()
    assert (watched.released, watched.buffers.held_bytes) == ([0, 1], 4 * NUM_BYTES)
    assert watched.buffers.indices == [2, 3]
    assert watched.count(3) == 2 * NUM_BYTES


def test_where_there_is_room_all_are_there_from_the_first_step(watched):
    watched.buffers.has_room_at_once = True
    watched.buffers.reserve(NUM_BYTES)
    watched.join()
    assert watched.buffers.indices == [0, 1]
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, NUM_BYTES]
    assert all(watched.buffers.is_found(index) for index in (0, 1))


def test_those_that_are_large_enough_are_left_alone(watched):
    watched.is_freed.set()
    watched.buffers.reserve(NUM_BYTES)
    watched.buffers.release_outgrown()
    watched.join()
    watched.is_asked.clear()
    watched.buffers.release_outgrown()
    watched.join()
    assert not watched.is_asked.is_set()
