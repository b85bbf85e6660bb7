import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.durable.retention import discard, prune, remove_orphans
from elastic.checkpoint.format.manifest import (
    COMMITTED,
    MANIFEST,
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    checksum,
    commit,
    find_damage,
    get_directory,
    get_shard_name,
    list_committed,
    read_manifest,
)
from elastic.errors import CheckpointError, StorageError
from elastic.ports import Progress
from elastic.storage import LocalStorage, open_storage

SHARD = get_shard_name(generation=2, rank=0)


def make_manifest(step=50, generation=2):
    chunk = Chunk(file=SHARD, offset=2, num_bytes=3, start=(0,), shape=(3,), crc32=(7,))
    return Manifest(
        progress=Progress(step=step, tokens=1000 * step),
        generation=generation,
        world_size=3,
        device="cpu",
        mesh=(3,),
        config={"train.seed": 0},
        config_hash="0123456789abcdef",
        tensors={"model.w": TensorRecord(dtype="U8", shape=(3,), chunks=(chunk,))},
        generators={},
        files={SHARD: FileRecord(size_bytes=5, header_bytes=2, header_crc32=1)},
        extra={"scale": 65536.0},
    )


def make_checkpoint(root, step):
    storage = open_storage(root)
    storage.write(f"{get_directory(step)}/{SHARD}", [b"shard"])
    commit(storage, get_directory(step), make_manifest(step))
    return root / get_directory(step)


def get_steps(root):
    return [checkpoint.step for checkpoint in list_committed(open_storage(root))]


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    make_checkpoint(tmp_path, 50)
    storage = open_storage(tmp_path)
    (checkpoint,) = list_committed(storage)
    assert read_manifest(storage, checkpoint) == make_manifest(50)


def test_checkpoints_are_listed_from_oldest_to_newest(tmp_path):
    for step in (100, 9, 50):
        make_checkpoint(tmp_path, step)
    assert get_steps(tmp_path) == [9, 50, 100]


def test_a_run_without_checkpoints_lists_none(tmp_path):
    assert get_steps(tmp_path) == []


def test_torn_and_foreign_directories_are_ignored(tmp_path):
    make_checkpoint(tmp_path, 1)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000002").mkdir()
    for name in ("step-3", "step-000000003", "tmp", "step-00000004.bak"):
        make_checkpoint(tmp_path, 5).rename(checkpoints / name)
    (checkpoints / "step-00000006").write_text("a file")
    (make_checkpoint(tmp_path, 7) / COMMITTED).write_text("")
    (make_checkpoint(tmp_path, 8) / MANIFEST).unlink()
    (make_checkpoint(tmp_path, 9) / COMMITTED).write_bytes(b"\xff\xfe")
    assert get_steps(tmp_path) == [1]


@settings(max_examples=30)  # each syncs files
@given(st.data())
def test_a_manifest_with_any_byte_changed_is_not_committed(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("run")
    path = make_checkpoint(root, 5) / MANIFEST
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert get_steps(root) == []


def test_a_missing_or_shortened_file_is_damage(tmp_path):
    shard = make_checkpoint(tmp_path, 5) / SHARD
    storage = open_storage(tmp_path)
    (checkpoint,) = list_committed(storage)
    manifest = read_manifest(storage, checkpoint)
    assert find_damage(storage, checkpoint, manifest) is None
    shard.write_bytes(b"shar")
    assert find_damage(storage, checkpoint, manifest) == f"{SHARD} has 4 bytes instead of 5"
    shard.unlink()
    assert find_damage(storage, checkpoint, manifest) == f"{SHARD} is missing"


def test_a_stored_manifest_without_checksums_is_damage_and_not_believed(tmp_path):
    storage = open_storage(tmp_path)
    make_checkpoint(tmp_path, 50)
    (checkpoint,) = list_committed(storage)
    manifest = read_manifest(storage, checkpoint)
    tensor = manifest.tensors["model.w"]
    bare = replace(tensor, chunks=(replace(tensor.chunks[0], crc32=()),))
    damage = find_damage(storage, checkpoint, replace(manifest, tensors={"model.w": bare}))
    assert damage == f"model.w has 0 checksums in {SHARD} instead of 1"
    files = {SHARD: replace(manifest.files[SHARD], header_crc32=None)}
    assert find_damage(storage, checkpoint, replace(manifest, files=files)) == f"the header of {SHARD} has no checksum"


@pytest.mark.parametrize(
    ("values", "damage"),
    [
        ({"chunk": {"offset": -1}}, "model.w: offset=-1 must be finite and not negative"),
        ({"chunk": {"num_bytes": "3"}}, "model.w: num_bytes='3' must be finite and not negative"),
        ({"file": {"header_bytes": -8}}, f"{SHARD}: header_bytes=-8 must be finite and not negative"),
        ({"manifest": {"world_size": 0}}, "world_size=0 must be finite and more than 0"),
        ({"progress": {"tokens": -5}}, "progress.tokens=-5 must be finite and not negative"),
    ],
)
def test_a_value_that_cannot_be_is_damage_whatever_its_checksum_says(tmp_path, values, damage):
    make_checkpoint(tmp_path, 50)
    storage = open_storage(tmp_path)
    (checkpoint,) = list_committed(storage)
    manifest = replace(read_manifest(storage, checkpoint), **values.get("manifest", {}))
    tensor = manifest.tensors["model.w"]
    chunk = replace(tensor.chunks[0], **values.get("chunk", {}))
    file = replace(manifest.files[SHARD], **values.get("file", {}))
    other = replace(
        manifest,
        progress=replace(manifest.progress, **values.get("progress", {})),
        tensors={"model.w": replace(tensor, chunks=(chunk,))},
        files={SHARD: file},
    )
    assert find_damage(storage, checkpoint, other) == damage


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_instead_of_misread(tmp_path, version):
    directory = make_checkpoint(tmp_path, 5)
    data = (directory / MANIFEST).read_bytes().replace(b'"format_version":2', b'"format_version":%d' % version)
    (directory / MANIFEST).write_bytes(data)
    (directory / COMMITTED).write_bytes(checksum(data))
    storage = open_storage(tmp_path)
    with pytest.raises(CheckpointError, match=f"format {version}, but this version of Solvent reads format 2"):
        read_manifest(storage, list_committed(storage)[0])


def test_a_renamed_checkpoint_is_refused(tmp_path):
    make_checkpoint(tmp_path, 5).rename(tmp_path / get_directory(6))
    storage = open_storage(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds step 5.*Rename it to step-00000005"):
        read_manifest(storage, list_committed(storage)[0])


def test_a_second_writer_of_a_step_is_refused_and_changes_nothing(tmp_path):
    directory = make_checkpoint(tmp_path, 5)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for generation in (1, 2, 3):
        with pytest.raises(StorageError, match=r"step-00000005 was committed by another writer"):
            commit(open_storage(tmp_path), get_directory(5), make_manifest(5, generation=generation))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_newer_writer_replaces_the_manifest_of_one_that_never_committed(tmp_path):
    (make_checkpoint(tmp_path, 5) / COMMITTED).unlink()
    with pytest.raises(StorageError, match=r"another writer \(attempt 2\)"):
        commit(open_storage(tmp_path), get_directory(5), make_manifest(5, generation=1))
    commit(open_storage(tmp_path), get_directory(5), make_manifest(5, generation=3))
    assert get_steps(tmp_path) == [5]


@settings(max_examples=20)  # each syncs files
@given(steps=st.sets(st.integers(0, 10**8 - 1), max_size=5), keep_last=st.integers(1, 6))
def test_pruning_keeps_exactly_the_newest(tmp_path_factory, steps, keep_last):
    root = tmp_path_factory.mktemp("run")
    for step in steps:
        make_checkpoint(root, step)
    prune(open_storage(root), keep_last)
    assert get_steps(root) == sorted(steps)[-keep_last:]


def test_pruning_never_takes_the_newest_that_is_whole(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    for step in (3, 4):
        (tmp_path / get_directory(step) / SHARD).unlink()
    prune(open_storage(tmp_path), 1)
    assert get_steps(tmp_path) == [2, 4]


def test_orphans_go_and_what_is_committed_damaged_foreign_or_newer_stays(tmp_path):
    make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / MANIFEST).write_text("damaged")
    (make_checkpoint(tmp_path, 3) / COMMITTED).unlink()
    (tmp_path / get_directory(4)).mkdir()
    (tmp_path / get_directory(4) / f".{SHARD}.1-0.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes" / "a").write_text("mine")
    newer = tmp_path / get_directory(5) / get_shard_name(generation=4, rank=0)
    newer.parent.mkdir()
    newer.write_bytes(b"")
    remove_orphans(open_storage(tmp_path), generation=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["notes", "step-00000001", "step-00000002", "step-00000005"]


def test_a_crash_while_a_checkpoint_is_removed_leaves_it_invisible(tmp_path, monkeypatch):
    directory = make_checkpoint(tmp_path, 1)
    delete = LocalStorage.delete

    def crash(self, keys):
        delete(self, keys)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "delete", crash)
    with pytest.raises(KeyboardInterrupt):
        discard(open_storage(tmp_path), 1)
    assert (directory / SHARD).exists()
    assert get_steps(tmp_path) == []


def test_looking_at_checkpoints_needs_no_torch():
    names = ("format.manifest", "format.compat", "durable.inspection", "durable.retention", "format.sources")
    modules = ", ".join(f"elastic.checkpoint.{name}" for name in names)
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)
