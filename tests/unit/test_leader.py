"""Who leads a run: one at a time, whatever happens to it, and who does not lead touches nothing."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from elastic.errors import StaleGenerationError, StorageError
from elastic.records.fencing import get_newest_generation, take_generation
from elastic.records.leader import KEY, Lease, lead
from elastic.storage.local import LocalStorage

LEASE_S = 0.5
"""Renewed five times in it."""


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(str(tmp_path))


def read_lease(storage) -> dict:
    return json.loads(storage.read(KEY))


def fake_leader(storage, **changes) -> None:
    """Leave what a leader leaves that died without a word."""
    take_generation(storage, 1, who="a dead driver")
    lease = Lease(
        who="a dead driver",
        epoch=1,
        beat=7,
        released=False,
        host="h",
        pid=os.getpid(),
        started=1,
        machine="m",
        token="t",
    )
    storage.write(KEY, [json.dumps({**asdict(lease), **changes}).encode()])


def measure_takeover(storage) -> float:
    start_s = time.monotonic()
    with lead(storage, who="the next driver", lease_s=LEASE_S) as leader:
        assert leader.generation == 2
        return time.monotonic() - start_s


def wait_until(condition):
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_leader_that_ends_is_followed_at_once_by_one_with_the_next_epoch(storage):
    with lead(storage, who="a driver", lease_s=60) as leader:
        assert leader.generation == 1
        assert not read_lease(storage)["released"]
    assert read_lease(storage)["released"]
    with lead(storage, who="another", lease_s=60) as leader:
        assert leader.generation == 2


def test_a_run_that_was_trained_before_there_were_epochs_goes_on_with_its_numbers(storage):
    with lead(storage, who="a driver", at_least=8) as leader:
        assert leader.generation == 8


def test_while_one_leads_another_is_refused_soon_and_touches_nothing(storage, tmp_path):
    def look():
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != KEY]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.suffix != ".tmp"}

    with lead(storage, who="the first driver", lease_s=LEASE_S):
        before, start_s = look(), time.monotonic()
        with pytest.raises(
            StorageError, match=r"is led by the first driver \(process \d+ on .*\) right now.*run="
        ) as told:
            lead(storage, who="a second one", lease_s=LEASE_S)
        assert time.monotonic() - start_s < LEASE_S
        assert told.value.exit_code == 2
        assert look() == before
        assert read_lease(storage)["who"] == "the first driver"


def test_a_leader_that_died_elsewhere_is_followed_when_its_lease_has_run_out_and_not_before(storage):
    fake_leader(storage)
    assert LEASE_S <= measure_takeover(storage) < LEASE_S + 1


def test_a_leader_that_died_on_this_machine_is_followed_at_once(storage):
    code = f"""
import os
from elastic.records.leader import lead
from elastic.storage.local import LocalStorage
lead(LocalStorage({storage.url!r}), who="a driver")
os._exit(0)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    assert measure_takeover(storage) < LEASE_S


def test_a_number_that_was_given_to_another_process_is_not_mistaken_for_the_leader(storage):
    with lead(storage, who="a driver", lease_s=LEASE_S):
        machine = read_lease(storage)["machine"]
    fake_leader_storage = LocalStorage(f"{storage.url}/other")
    fake_leader(fake_leader_storage, machine=machine)  # our own process id, but another start time
    assert measure_takeover(fake_leader_storage) < LEASE_S


def test_the_last_words_of_an_older_leader_say_nothing_about_the_newest(storage):
    fake_leader(storage, released=True)
    take_generation(storage, 2, who="one that has not said more yet")
    start_s = time.monotonic()
    with lead(storage, who="a third", lease_s=LEASE_S) as leader:
        assert leader.generation == 3
    assert time.monotonic() - start_s >= LEASE_S


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"who": "a version to come"}'])
def test_a_lease_that_cannot_be_read_runs_out(storage, left):
    fake_leader(storage)
    storage.write(KEY, [left])
    assert measure_takeover(storage) >= LEASE_S


def test_of_many_that_follow_a_leader_at_one_time_one_leads(storage):
    fake_leader(storage)
    leaders, refused = [], []

    def follow(number):
        try:
            leaders.append(lead(storage, who=f"driver {number}", lease_s=LEASE_S))
        except StorageError as error:
            refused.append(error)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(leaders), len(refused)) == (1, 5)
    leaders[0].check()
    leaders[0].close()


def test_each_attempt_takes_the_epoch_of_its_number_before_it_starts(storage):
    with lead(storage, who="a driver", lease_s=LEASE_S) as leader:
        for attempt in (1, 2, 3):
            leader.take(attempt)
            assert get_newest_generation(storage) == attempt
        wait_until(lambda: read_lease(storage)["epoch"] == 3)
        leader.check()


def test_a_leader_that_was_followed_takes_no_epoch_and_leaves_the_lease_alone(storage):
    leader = lead(storage, who="one that sleeps", lease_s=LEASE_S)
    take_generation(storage, 2, who="its follower")
    with pytest.raises(StaleGenerationError, match="its follower"):
        leader.take(2)
    storage.write(KEY, [b"the follower's"])
    leader.close()
    assert storage.read(KEY) == b"the follower's"


def test_a_leader_finds_out_by_itself_that_it_was_followed(storage):
    leader = lead(storage, who="one that sleeps", lease_s=LEASE_S)
    take_generation(storage, 2, who="its follower")

    def is_told():
        try:
            leader.check()
        except StaleGenerationError:
            return True
        return False

    wait_until(is_told)


class Breakable(LocalStorage):
    broken = False

    def write(self, key, chunks):
        if self.broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(key, chunks)

    def list(self, prefix=""):
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        return super().list(prefix)


def test_a_storage_that_breaks_for_a_while_ends_no_leadership_and_is_told_of_once(tmp_path, caplog):
    storage = Breakable(str(tmp_path))
    with lead(storage, who="a driver", lease_s=LEASE_S) as leader:
        storage.broken = True
        with caplog.at_level(logging.WARNING):
            time.sleep(LEASE_S)
            leader.check()
        assert len(caplog.records) == 1
        storage.broken = False
        beat = read_lease(storage)["beat"]
        wait_until(lambda: read_lease(storage)["beat"] > beat)


def test_a_storage_on_which_no_epoch_can_be_taken_is_the_users_to_mend(tmp_path):
    storage = Breakable(str(tmp_path))
    storage.broken = True
    with pytest.raises(StorageError, match="Free or unlock the storage"):
        lead(storage, who="a driver")


def test_who_must_not_wait_for_the_storage_hears_what_the_leaders_thread_has_found(storage):
    with lead(storage, who="a driver", lease_s=1000) as leader:  # it looks again in minutes
        take_generation(storage, 2, who="another driver")
        leader.check_known()
        with pytest.raises(StaleGenerationError):
            leader.check()
        with pytest.raises(StaleGenerationError):
            leader.check_known()
    with lead(storage, who="a third", lease_s=LEASE_S) as leader:
        take_generation(storage, leader.generation + 1, who="a fourth")
        with pytest.raises(StaleGenerationError):
            wait_until(leader.check_known)
