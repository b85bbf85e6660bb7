"""Epochs: each is taken once, and who holds an older one finds out."""

import errno
import threading

import pytest

from elastic.errors import StaleGenerationError, StorageError
from elastic.records.fencing import (
    FencedSink,
    GenerationGuard,
    check_generation,
    get_newest_generation,
    take_generation,
)
from elastic.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(str(tmp_path))


def test_the_newest_epoch_counts_and_the_older_ones_are_told_who_took_over(storage):
    assert get_newest_generation(storage) == 0
    take_generation(storage, 1, who="a first driver")
    check_generation(storage, 1)
    take_generation(storage, 3, who="another driver")
    check_generation(storage, 3)
    assert get_newest_generation(storage) == 3
    with pytest.raises(
        StaleGenerationError, match=r"another driver \(process \d+ on .*\) took over .* as attempt 3"
    ) as told:
        check_generation(storage, 1)
    assert (isinstance(told.value, StorageError), told.value.exit_code) == (True, 2)


@pytest.mark.parametrize("number", [2, 1])
def test_an_epoch_that_is_taken_or_older_than_the_newest_is_refused(storage, number):
    take_generation(storage, 2, who="a first driver")
    with pytest.raises(StaleGenerationError, match="a first driver"):
        take_generation(storage, number, who="another driver")


def test_of_many_that_want_an_epoch_at_one_time_one_gets_it(storage):
    barrier, won = threading.Barrier(8), []

    def take(number):
        barrier.wait()
        try:
            take_generation(storage, 1, who=f"driver {number}")
        except StaleGenerationError:
            return
        won.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


class Flaky(LocalStorage):
    """Fails the first puts, some after they were done."""

    def __init__(self, root, failures):
        super().__init__(root)
        self.failures = failures

    def put_new(self, key, data):
        if not self.failures:
            return super().put_new(key, data)
        if self.failures.pop(0) == "after":
            super().put_new(key, data)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failures", [["before"], ["after"], ["before", "after"]])
def test_a_put_that_fails_is_tried_again_and_one_whose_answer_was_lost_is_known_as_our_own(tmp_path, failures):
    storage = Flaky(str(tmp_path), failures)
    take_generation(storage, 1, who="a driver", patience_s=5)
    assert get_newest_generation(storage) == 1


def test_without_patience_the_storages_error_is_raised(tmp_path):
    with pytest.raises(OSError, match="No space"):
        take_generation(Flaky(str(tmp_path), ["before"]), 1, who="a driver")


def test_what_is_not_an_epoch_is_passed_over(storage, tmp_path):
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs/notes.txt").write_text("")
    take_generation(storage, 1, who="a driver")
    assert get_newest_generation(storage) == 1


def test_a_guard_looks_again_only_after_a_time_in_which_it_may_have_slept():
    looks, clock = [], [100.0]
    guard = GenerationGuard(lambda: looks.append(clock[0]), every_s=2.0, now_s=lambda: clock[0])
    for clock[0] in (100.0, 101.9, 102.0, 103.9, 500.0, 501.0):
        guard.check_if_due()
    assert looks == [100.0, 102.0, 500.0]


class Rows(list):
    write = list.append

    def close(self):
        self.append("closed")


def test_a_sink_takes_no_row_of_an_epoch_that_is_over(storage):
    take_generation(storage, 1, who="a driver")
    rows = Rows()
    sink = FencedSink(rows, GenerationGuard(lambda: check_generation(storage, 1), every_s=0))
    sink.write({"step": 1})
    take_generation(storage, 2, who="another")
    with pytest.raises(StaleGenerationError):
        sink.write({"step": 2})
    sink.close()
    assert rows == [{"step": 1}, "closed"]


def test_a_sink_takes_rows_though_the_storage_cannot_be_listed():
    def fail():
        raise OSError(errno.EIO, "flaky")

    rows = Rows()
    FencedSink(rows, GenerationGuard(fail)).write({"step": 1})
    assert rows == [{"step": 1}]


def test_a_storage_whose_files_are_gone_confirms_no_epoch(tmp_path):
    storage = LocalStorage(str(tmp_path / "run"))
    take_generation(storage, 1, who="a test")
    check_generation(storage, 1)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="unmounted"):
        check_generation(storage, 1)
