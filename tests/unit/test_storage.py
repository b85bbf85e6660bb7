import errno
import os
import time
from pathlib import Path

import pytest

from elastic.storage import LocalStorage, join_url, open_storage
from elastic.storage.faulty import Fault, FaultyStorage, write_fault
from elastic.storage.retry import RetryingStorage


class Failing(LocalStorage):
    """Fails a number of times before it works."""

    def __init__(self, root, failures):
        super().__init__(str(root))
        self.failures = failures
        self.tries = 0

    def write(self, key, chunks):
        self.tries += 1
        if self.failures:
            raise self.failures.pop(0)
        return super().write(key, chunks)


def test_what_a_killed_writer_left_is_no_key_and_is_swept(tmp_path):
    storage = open_storage(tmp_path)
    storage.write("checkpoints/step-1/x", [b"x"])
    (tmp_path / "checkpoints/step-2").mkdir()
    (tmp_path / "checkpoints/step-2/.y.1-0.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints/step-1/.z.1-0.tmp").write_bytes(b"half")
    assert storage.list() == ["checkpoints/step-1/x"]
    storage.sweep("checkpoints/")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "checkpoints",
        "checkpoints/step-1",
        "checkpoints/step-1/x",
    ]


def test_a_directory_goes_with_its_last_file(tmp_path):
    storage = open_storage(tmp_path)
    for key in ("a/b/x", "a/b/y", "z"):
        storage.write(key, [b""])
    storage.delete(["a/b/x"])
    assert (tmp_path / "a/b").is_dir()
    storage.delete(["a/b/y", "z"])
    assert list(tmp_path.iterdir()) == []


def test_names_are_durable_before_a_write_returns(tmp_path, monkeypatch):
    """Every directory that got a new name is synced after it got it."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1]
    )
    LocalStorage(str(tmp_path)).write("a/b/x", [b"1"])
    assert synced[:2] == [str(tmp_path), str(tmp_path / "a")]
    assert ".x." in synced[2]
    assert synced[3:] == [str(tmp_path / "a/b")]


def test_what_may_pass_is_tried_again_with_longer_pauses(tmp_path):
    pauses = []
    inner = Failing(tmp_path, [OSError(errno.EIO, "once"), OSError(errno.ESTALE, "twice")])
    assert RetryingStorage(inner, sleep=pauses.append).write("x", [b"1"]) == 1
    assert 0.05 <= pauses[0] <= 0.1 <= pauses[1] <= 0.2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT])
def test_what_will_not_pass_is_raised_at_once(tmp_path, number):
    inner = Failing(tmp_path, [OSError(number, "no")])
    with pytest.raises(OSError, match="no"):
        RetryingStorage(inner, sleep=time.sleep).write("x", [b"1"])
    assert inner.tries == 1


def test_patience_ends(tmp_path):
    clock = iter([0, 59, 61])
    inner = Failing(tmp_path, [OSError(errno.EIO, "no")] * 10)
    with pytest.raises(OSError, match="no"):
        RetryingStorage(inner, sleep=lambda _: None, now_s=lambda: next(clock)).write("x", [b"1"])
    assert inner.tries == 2


def test_chunks_that_are_used_up_are_not_written_twice(tmp_path):
    inner = Failing(tmp_path, [OSError(errno.EIO, "no")])
    with pytest.raises(OSError, match="no"):
        RetryingStorage(inner).write("x", iter([b"1"]))
    assert inner.tries == 1


def test_a_full_storage_refuses_what_takes_space_and_lets_the_rest_pass(tmp_path):
    write_fault(control := tmp_path / "control", Fault(kind="full", until_s=100))
    now_s = 99.0
    storage = FaultyStorage(LocalStorage(str(tmp_path / "run")), control, now_s=lambda: now_s)
    for change in (lambda: storage.write("x", [b"1"]), lambda: storage.put_new("x", b"1")):
        with pytest.raises(OSError, match="No space left") as caught:
            change()
        assert caught.value.errno == errno.ENOSPC
    assert storage.list() == []
    now_s = 101.0
    assert storage.put_new("x", b"1")


def test_a_slow_storage_lets_so_many_bytes_pass_in_a_second(tmp_path):
    pauses = []
    write_fault(control := tmp_path / "control", Fault(kind="slow", rate=4.0))
    storage = FaultyStorage(LocalStorage(str(tmp_path / "run")), control, sleep=pauses.append)
    storage.write("x", [bytes(2**20)] * 2)
    assert sum(pauses) == pytest.approx(0.05 + 2 / 4)
    pauses.clear()
    storage.read("x")
    assert sum(pauses) == pytest.approx(0.05 + 2 / 4)


def test_a_storage_can_be_slow_and_full_at_once_each_for_its_time(tmp_path):
    pauses, now_s, control = [], 9.0, tmp_path / "control"
    write_fault(control, Fault(kind="full", until_s=10))
    write_fault(control, Fault(kind="slow", until_s=20))
    inner = LocalStorage(str(tmp_path / "run"))
    storage = FaultyStorage(inner, control, sleep=pauses.append, now_s=lambda: now_s)
    with pytest.raises(OSError, match="No space left"):
        storage.put_new("x", b"1")
    assert storage.list() == []
    assert pauses == [0.05]
    now_s = 11.0
    assert storage.put_new("x", b"1")
    assert pauses == [0.05, 0.05]
    now_s = 21.0
    assert storage.list() == ["x"]
    assert pauses == [0.05, 0.05]


def test_half_of_the_flaky_writes_were_done(tmp_path):
    write_fault(control := tmp_path / "control", Fault(kind="flaky", rate=1.0, seed=1))
    storage = FaultyStorage(LocalStorage(str(tmp_path / "run")), control)
    for i in range(200):
        with pytest.raises(OSError, match="failed on demand"):
            storage.put_new(f"{i:03}", b"")
    control.unlink()
    assert 70 <= len(storage.list()) <= 130  # 100 +- 4 standard deviations of 7


def test_a_place_below_a_path_or_a_url_is_named_alike():
    assert join_url("runs/", "a") == "runs/a"
    assert join_url("s3://bucket/runs/", "a") == "s3://bucket/runs/a"


def test_a_folder_that_was_unmounted_is_not_made_anew_on_the_disk_below(tmp_path):
    storage = LocalStorage(str(tmp_path / "mount" / "run"))
    storage.write("leader.json", [b"1"])
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    for write in (lambda: storage.write("leader.json", [b"2"]), lambda: storage.put_new("epochs/1", b"2")):
        with pytest.raises(FileNotFoundError, match="unmounted"):
            write()
    assert not (tmp_path / "mount").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    storage.write("leader.json", [b"3"])
    assert storage.read("leader.json") == b"3"


def test_what_cannot_be_listed_is_not_called_empty(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")  # stands for any error of a file system: it leads nowhere
    with pytest.raises(OSError, match="symbolic links"):
        LocalStorage(str(tmp_path)).list("checkpoints/")
    assert LocalStorage(str(tmp_path / "none")).list("checkpoints/") == []
