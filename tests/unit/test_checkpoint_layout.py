import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.keep import discard, prune, remove_orphans
from elastic.checkpoint.layout import (
    COMMITTED,
    MANIFEST,
    FileRecord,
    Manifest,
    checksum,
    commit,
    find_damage,
    get_directory,
    list_committed,
    read_manifest,
)
from elastic.errors import CheckpointError
from elastic.ports import Progress


def make_manifest(step=50, files=None):
    return Manifest(
        progress=Progress(step=step, tokens=1000 * step),
        world_size=3,
        device="cpu",
        mesh=(3,),
        config={"train.seed": 0},
        config_hash="0123456789abcdef",
        tensors={"model.w": (4, 2), "optim.w.step": ()},
        files=files or {},
        extra={"scale": 65536.0},
    )


def make_checkpoint(checkpoints, step):
    directory = get_directory(checkpoints, step)
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(b"shard")
    commit(directory, make_manifest(step, {"__0_0.distcp": FileRecord(size_bytes=5, checksum=checksum(b"shard"))}))
    return directory


def get_steps(checkpoints):
    return [checkpoint.step for checkpoint in list_committed(checkpoints)]


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    make_checkpoint(tmp_path, 50)
    (checkpoint,) = list_committed(tmp_path)
    record = FileRecord(size_bytes=5, checksum="crc32:a4da7b8c")
    expected = make_manifest(50, {"__0_0.distcp": record})
    assert read_manifest(checkpoint).files["__0_0.distcp"].size_bytes == 5
    assert read_manifest(checkpoint).progress == expected.progress
    assert read_manifest(checkpoint).tensors == expected.tensors
    assert read_manifest(checkpoint).mesh == (3,)
    assert json.loads((checkpoint.path / MANIFEST).read_text())["format_version"] == 1


def test_checkpoints_are_listed_from_oldest_to_newest(tmp_path):
    for step in (100, 9, 50):
        make_checkpoint(tmp_path, step)
    assert get_steps(tmp_path) == [9, 50, 100]


def test_a_run_without_checkpoints_lists_none(tmp_path):
    assert list_committed(tmp_path / "checkpoints") == []


def test_torn_and_foreign_directories_are_ignored(tmp_path):
    make_checkpoint(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    for name in ("step-3", "step-000000003", "tmp", "step-00000004.bak"):
        make_checkpoint(tmp_path, 5).rename(tmp_path / name)
    (tmp_path / "step-00000006").write_text("a file")
    (make_checkpoint(tmp_path, 7) / COMMITTED).write_text("")
    (make_checkpoint(tmp_path, 8) / MANIFEST).unlink()
    (make_checkpoint(tmp_path, 9) / COMMITTED).write_bytes(b"\xff\xfe")
    assert get_steps(tmp_path) == [1]


@given(st.data())
def test_a_manifest_with_any_byte_changed_is_not_committed(tmp_path_factory, data):
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    path = make_checkpoint(checkpoints, 5) / MANIFEST
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert list_committed(checkpoints) == []


def test_a_missing_or_shortened_file_is_damage(tmp_path):
    shard = make_checkpoint(tmp_path, 5) / "__0_0.distcp"
    (checkpoint,) = list_committed(tmp_path)
    manifest = read_manifest(checkpoint)
    assert find_damage(checkpoint, manifest) is None
    shard.write_bytes(b"shar")
    assert find_damage(checkpoint, manifest) == "__0_0.distcp has 4 bytes instead of 5"
    shard.unlink()
    assert find_damage(checkpoint, manifest) == "__0_0.distcp is missing"


def test_a_newer_format_is_refused_instead_of_misread(tmp_path):
    directory = make_checkpoint(tmp_path, 5)
    data = (directory / MANIFEST).read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    (directory / MANIFEST).write_bytes(data)
    (directory / COMMITTED).write_text(checksum(data))
    with pytest.raises(CheckpointError, match="format 2, but this version of Solvent reads format 1"):
        read_manifest(list_committed(tmp_path)[0])


def test_a_renamed_checkpoint_is_refused(tmp_path):
    make_checkpoint(tmp_path, 5).rename(get_directory(tmp_path, 6))
    with pytest.raises(CheckpointError, match="holds step 5"):
        read_manifest(list_committed(tmp_path)[0])


@given(steps=st.sets(st.integers(0, 10**8 - 1), max_size=5), keep_last=st.integers(1, 6))
def test_pruning_keeps_exactly_the_newest(tmp_path_factory, steps, keep_last):
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    for step in steps:
        make_checkpoint(checkpoints, step)
    prune(checkpoints, keep_last)
    assert get_steps(checkpoints) == sorted(steps)[-keep_last:]


def test_orphans_go_and_committed_or_damaged_checkpoints_stay(tmp_path):
    make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / MANIFEST).write_text("damaged")
    get_directory(tmp_path, 3).mkdir()
    (tmp_path / "notes").mkdir()
    remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000001", "step-00000002"]


def test_a_crash_while_a_checkpoint_is_removed_leaves_it_invisible(tmp_path, monkeypatch):
    directory = make_checkpoint(tmp_path, 1)

    def crash(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr("elastic.checkpoint.keep.shutil.rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        discard(directory)
    assert directory.exists()
    assert list_committed(tmp_path) == []


def test_looking_at_checkpoints_needs_no_torch():
    modules = ", ".join(f"elastic.checkpoint.{name}" for name in ("layout", "keep", "fit", "storage"))
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)
