import errno

import pytest

from elastic.checkpoint.durable.storage_errors import (
    check_space,
    check_writable,
    estimate_checkpoint_bytes,
    explain,
    keep_trying,
)
from elastic.errors import StorageError
from elastic.storage import open_storage


def test_storage_that_can_be_written_is_left_clean(tmp_path):
    check_writable(open_storage(tmp_path / "runs" / "a"))
    assert list((tmp_path / "runs" / "a").iterdir()) == []


def test_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    with pytest.raises(StorageError, match=r"storage: .*runs.*cannot be written") as caught:
        check_writable(open_storage(tmp_path / "runs" / "a"))
    assert caught.value.exit_code == 2


def test_a_run_whose_checkpoints_do_not_fit_is_refused(tmp_path):
    storage = open_storage(tmp_path / "not" / "there" / "yet")
    check_space(storage, estimate_checkpoint_bytes(1000))
    with pytest.raises(StorageError, match=r"need 11\d{5}\.\d\d GiB"):  # 10^14 * 12 bytes = 1117587 GiB
        check_space(storage, estimate_checkpoint_bytes(10**14))


def test_a_full_disk_is_explained_with_what_to_do():
    error = explain(OSError(errno.ENOSPC, "No space left on device"), "runs/a")
    assert "No space left on device" in str(error)
    assert "lower checkpoint.keep_last" in str(error)


def test_storage_that_is_full_for_a_moment_is_waited_for_and_one_that_stays_full_is_not(caplog):
    looks = []

    def look():
        looks.append(None)
        if len(looks) < 3:
            raise StorageError("storage: full.")

    with pytest.raises(StorageError, match="full"):
        keep_trying(look, patience_s=0)
    assert len(looks) == 1
    keep_trying(look, patience_s=30)
    assert len(looks) == 3
    assert caplog.messages == ["storage: full. Trying for 30 s."]
