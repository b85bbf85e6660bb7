"""One daemon per folder."""

import contextlib
import fcntl
import shutil
import stat
import sys

import pytest

from cluster.runtime.node import daemon
from cluster.runtime.node.daemon import take_folder


def test_a_folder_is_its_owner_s_alone_and_is_taken_once(tmp_path):
    folder = tmp_path / "above" / "host"
    assert take_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not take_folder(folder)


def test_a_folder_that_its_owner_has_removed_is_made_and_taken_anew(tmp_path):
    folder = tmp_path / "host"
    assert take_folder(folder)
    shutil.rmtree(folder)
    assert take_folder(folder)
    assert not take_folder(folder)


@pytest.mark.parametrize("another_is_faster", [False, True])
def test_the_lock_of_a_folder_that_was_removed_meanwhile_is_worth_nothing(tmp_path, monkeypatch, another_is_faster):
    folder = tmp_path / "host"
    lock = fcntl.flock

    def lock_too_late(file, operation):
        shutil.rmtree(folder)  # its owner ends
        if another_is_faster:
            monkeypatch.setattr(fcntl, "flock", lock)
            assert take_folder(folder)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    assert not take_folder(folder)


def test_a_full_disk_ends_no_daemon_that_has_something_to_say(monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            print("the look itself works", flush=True)
        daemon.log("a connection was refused")
        monkeypatch.undo()
        with contextlib.suppress(OSError):  # what it holds goes nowhere
            full.close()
