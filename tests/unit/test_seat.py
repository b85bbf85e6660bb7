"""The seat of a coordinator, as the hosts find it."""

import stat

import pytest

from cluster.runtime.seat import Seat, read_seat, write_seat
from cluster.runtime.start_host import find_older, get_host_folder, new_session


def test_no_seat_is_none(tmp_path):
    assert read_seat(tmp_path) is None


@pytest.mark.parametrize(("first", "second", "found"), [(1, 2, 2), (2, 1, 2), (10, 9, 10)])
def test_the_newest_coordinator_has_the_seat_whoever_writes_last(tmp_path, first, second, found):
    for epoch in (first, second):
        write_seat(tmp_path, Seat(epoch=epoch, host="10.0.0.1", port=epoch))
    assert read_seat(tmp_path) == Seat(epoch=found, host="10.0.0.1", port=found)


def test_only_its_owner_can_read_it_and_nothing_else_stays(tmp_path):
    write_seat(tmp_path, Seat(epoch=1, host="10.0.0.1", port=1))
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_hosts_of_a_run_s_earlier_sessions_on_the_same_node_are_found_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    earlier, now, other_run = (new_session(run) for run in ("aaaaaaaa", "aaaaaaaa", "bbbbbbbb"))
    folders = [get_host_folder(node, s) for node in ("n" * 56, "m" * 56) for s in (earlier, now, other_run)]
    for folder in folders:
        folder.mkdir()
    assert len(set(folders)) == len(folders)
    assert find_older(get_host_folder("n" * 56, now), now) == [get_host_folder("n" * 56, earlier)]
