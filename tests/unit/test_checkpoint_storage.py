import errno

import pytest

from elastic.checkpoint.storage import check_space, check_writable, estimate_checkpoint_bytes, explain, write_durably
from elastic.errors import StorageError
from elastic.rundir import RunDir


def test_storage_that_can_be_written_is_prepared_and_left_clean(tmp_path):
    run_dir = RunDir(tmp_path / "runs" / "a")
    check_writable(run_dir)
    assert list(run_dir.checkpoints.iterdir()) == []


def test_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    with pytest.raises(StorageError, match=r"storage: .*runs.*cannot be written") as caught:
        check_writable(RunDir(tmp_path / "runs" / "a"))
    assert caught.value.exit_code == 2


def test_a_run_whose_checkpoints_do_not_fit_is_refused(tmp_path):
    check_space(RunDir(tmp_path), estimate_checkpoint_bytes(1000))
    with pytest.raises(StorageError, match=r"need 11\d{5}\.\d\d GiB"):  # 10^14 * 12 bytes = 1117587 GiB
        check_space(RunDir(tmp_path), estimate_checkpoint_bytes(10**14))


def test_a_full_disk_is_explained_with_what_to_do(tmp_path):
    error = explain(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert "No space left on device" in str(error)
    assert "lower checkpoint.keep_last" in str(error)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    for content in (b"long content", b"short"):
        write_durably(tmp_path / "file", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"short")]
