"""Which memory a trainer's arenas take up, and when."""

import os
import threading

import pytest
import torch

from elastic.checkpoint.staging.host_buffers import HostArenas
from elastic.checkpoint.staging.shared_memory import Arena
from tests.unit.test_checkpoint_shared_memory import count_bytes

NUM_BYTES = 1 << 20
WAIT_S = 10


class Watched:
    """Two arenas, and all that is told of them."""

    def __init__(self) -> None:
        self.descriptors: dict[int, int] = {}
        self.released: list[int] = []
        self.is_asked, self.is_freed = threading.Event(), threading.Event()
        self.arenas = HostArenas(
            torch.device("cpu"),
            count=2,
            on_allocated=self._hold,
            on_released=self.released.append,
            wait_for_freed=self._wait,
        )

    def _hold(self, index: int, arena: Arena) -> None:
        self.descriptors[index] = os.dup(arena.descriptor)

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
    watched.arenas.make_room(NUM_BYTES)
    watched.join()
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, 0]

    watched.arenas.release_outgrown()
    assert watched.is_asked.wait(WAIT_S)
    assert watched.count(1) == 0
    watched.is_freed.set()
    watched.join()
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, NUM_BYTES]


def test_smaller_ones_are_kept_until_the_first_of_the_larger_ones_is_filled(watched):
    watched.is_freed.set()
    watched.arenas.make_room(NUM_BYTES)
    watched.arenas.release_outgrown()
    watched.arenas.make_room(NUM_BYTES // 2)
    assert (watched.arenas.indices, watched.arenas.held_bytes) == ([0, 1], 2 * NUM_BYTES)

    watched.arenas.make_room(2 * NUM_BYTES)
    assert (watched.arenas.indices, watched.arenas.held_bytes) == ([2], 6 * NUM_BYTES)
    assert watched.released == []
    assert len(watched.arenas.get(0)) == NUM_BYTES

    watched.arenas.release_outgrown()
    watched.join()
    assert (watched.released, watched.arenas.held_bytes) == ([0, 1], 4 * NUM_BYTES)
    assert watched.arenas.indices == [2, 3]
    assert watched.count(3) == 2 * NUM_BYTES


def test_where_there_is_room_all_are_there_from_the_first_step(watched):
    watched.arenas.is_roomy = True
    watched.arenas.make_room(NUM_BYTES)
    watched.join()
    assert watched.arenas.indices == [0, 1]
    assert [watched.count(index) for index in (0, 1)] == [NUM_BYTES, NUM_BYTES]
    assert all(watched.arenas.is_found(index) for index in (0, 1))


def test_those_that_are_large_enough_are_left_alone(watched):
    watched.is_freed.set()
    watched.arenas.make_room(NUM_BYTES)
    watched.arenas.release_outgrown()
    watched.join()
    watched.is_asked.clear()
    watched.arenas.release_outgrown()
    watched.join()
    assert not watched.is_asked.is_set()
