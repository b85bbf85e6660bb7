"""Saving and restoring over real gloo ranks."""

import os
import resource
import signal
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from elastic.checkpoint.format.manifest import COMMITTED, MANIFEST, list_committed, read_manifest
from elastic.checkpoint.staging.stager import Stager
from elastic.checkpoint.train_state import get_live_state
from elastic.config import TrainConfig
from elastic.errors import CheckpointError, ConfigError, SavesFailedError, StorageError
from elastic.storage import LocalStorage, open_storage
from elastic.storage.faulty import FAULTS_VARIABLE, Fault, write_fault
from tests.distributed._spawn_ckpt import (
    CONFIG,
    build,
    do_restore,
    get_values,
    make_checkpointer,
    make_progress,
    run_ranks,
    train,
)


def get_steps(run_dir):
    return [checkpoint.step for checkpoint in list_committed(open_storage(run_dir))]


def get_manifest(run_dir):
    storage = open_storage(run_dir)
    (checkpoint,) = list_committed(storage)
    return read_manifest(storage, checkpoint), run_dir / checkpoint.directory


def train_and_save(run_dir, strategy, steps=(3,), last_step=6):
    """Save while training goes on, and return the state at each saved step and at the last."""
    model, optimizer = build(strategy)
    committed = []
    checkpointer = make_checkpointer(run_dir, on_committed=lambda progress: committed.append(progress.step))
    values, done = {}, 0
    for step in steps:
        train(model, optimizer, done + 1, step, checkpointer)
        done = step
        values[step] = get_values(model, optimizer)
        checkpointer.finish()
        assert checkpointer.start_save(model, optimizer, progress=make_progress(step), extra={"scale": 0.1 + step})
    train(model, optimizer, done + 1, last_step, checkpointer)
    values[last_step] = get_values(model, optimizer)
    newest = checkpointer.finish()
    usual_save_s = checkpointer.forecast.get_usual_s("storage")
    checkpointer.close()
    return values, committed, newest, usual_save_s


def restore_and_train(run_dir, strategy, last_step=6):
    model, optimizer = build(strategy, model_seed=1)
    restored = do_restore(run_dir, model, optimizer)
    values = {restored.progress.step: get_values(model, optimizer)}
    train(model, optimizer, restored.progress.step + 1, last_step)
    values[last_step] = get_values(model, optimizer)
    return restored.progress, restored.extra, values


def test_a_save_on_three_ranks_restores_on_any_world_and_strategy(tmp_path):
    saved = run_ranks(train_and_save, 3, tmp_path, "fsdp2")
    values, committed, newest, usual_save_s = saved[0]
    assert committed == [3]
    assert newest == make_progress(3)
    assert [other[1] for other in saved[1:]] == [[], []], "only rank 0 reports a commit"
    assert [other[3] for other in saved] == [usual_save_s] * 3
    for num_ranks, strategy in ((2, "fsdp2"), (1, "single"), (2, "ddp"), (2, "hsdp")):
        for progress, extra, restored in run_ranks(restore_and_train, num_ranks, tmp_path, strategy):
            assert (progress, extra) == (make_progress(3), {"scale": 3.1})
            assert restored[3] == values[3], f"{num_ranks} ranks of {strategy} restored another state"


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(tmp_path, strategy):
    unbroken = run_ranks(train_and_save, 2, tmp_path, strategy)[0][0]
    resumed = run_ranks(restore_and_train, 2, tmp_path, strategy)[0][2]
    assert resumed == unbroken


def restore_and_save_again(run_dir, strategy):
    model, optimizer = build(strategy, model_seed=1)
    restored = do_restore(run_dir, model, optimizer)
    checkpointer = make_checkpointer(run_dir, generation=2)
    checkpointer.plan_ahead(restored.live, optimizer)
    train(model, optimizer, 4, 5, checkpointer)
    assert checkpointer.save_now(model, optimizer, progress=make_progress(5), extra={})
    checkpointer.close()
    return get_values(model, optimizer)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_what_was_planned_before_training_went_on_saves_what_came_of_it(tmp_path, strategy):
    run_ranks(train_and_save, 3, tmp_path, strategy)
    values = run_ranks(restore_and_save_again, 3, tmp_path, strategy)[0]
    progress, _, restored = run_ranks(restore_and_train, 2, tmp_path, "fsdp2", 5)[0]
    assert progress == make_progress(5)
    assert restored[5] == values


def test_one_checkpointer_saves_again_and_again_and_keeps_the_newest(tmp_path):
    orphan = tmp_path / "checkpoints" / "step-00000009"
    orphan.mkdir(parents=True)
    (orphan / "e00000001-00000.safetensors").write_bytes(b"")
    values = run_ranks(train_and_save, 2, tmp_path, "fsdp2", (1, 2, 3, 5))[0][0]
    assert not orphan.exists(), "what an earlier attempt left is removed"
    assert get_steps(tmp_path) == [3, 5]  # keep_last = 2
    assert run_ranks(restore_and_train, 2, tmp_path, "fsdp2")[0][2] == {5: values[5], 6: values[6]}


def test_a_tied_weight_is_saved_once(tmp_path):
    run_ranks(train_and_save, 1, tmp_path, "fsdp2")
    tensors = get_manifest(tmp_path)[0].tensors
    assert {name for name in tensors if name.startswith("model.")} == {
        "model.embed.weight",
        "model.hidden.weight",
        "model.hidden.bias",
    }


def restore_nothing(run_dir):
    return do_restore(run_dir, *build("fsdp2"))


def test_a_new_run_restores_nothing(tmp_path):
    assert run_ranks(restore_nothing, 1, tmp_path) == [None]


class Wide(nn.Module):
    """Three tensors of 64 KiB: data outweigh the overhead of torch's archive format."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(3)])

    def forward(self, x):
        return self.layers(x)


def save_wide(run_dir, strategy):
    model, optimizer = build(strategy, make_model=Wide)
    checkpointer = make_checkpointer(run_dir)
    checkpointer.save_now(model, optimizer, progress=make_progress(1), extra={})
    checkpointer.close()


@pytest.mark.parametrize(("strategy", "num_ranks"), [("ddp", 2), ("hsdp", 4)])
def test_what_ranks_hold_alike_is_written_once_and_by_all_of_them(tmp_path, strategy, num_ranks):
    run_ranks(save_wide, num_ranks, tmp_path, strategy)
    manifest, _ = get_manifest(tmp_path)
    data_bytes = [record.size_bytes - record.header_bytes for record in manifest.files.values()]
    # three weights, each with two moments and a step of 4 bytes; and the generators of each rank
    rng_bytes = num_ranks * torch.get_rng_state().numel()
    assert sum(data_bytes) == 3 * (3 * 128 * 128 * 4 + 4) + rng_bytes, "the bytes of a save are those of the state"
    assert len(data_bytes) == num_ranks
    assert min(data_bytes) > 0.9 * max(data_bytes)


def test_the_manifest_describes_every_file_as_it_lies_there(tmp_path):
    run_ranks(save_wide, 2, tmp_path, "fsdp2")
    manifest, directory = get_manifest(tmp_path)
    present = {path.name for path in directory.iterdir()} - {MANIFEST, COMMITTED}
    assert present == manifest.files.keys() == {"e00000001-00000.safetensors", "e00000001-00001.safetensors"}
    assert (manifest.world_size, manifest.mesh, manifest.generation) == (2, (2,), 1)
    assert manifest.tensors["optim.layers.0.weight.exp_avg"].shape == (128, 128)
    assert manifest.generators.keys() == {"rng.cpu.0", "rng.cpu.1"}
    for name, record in manifest.files.items():
        data = (directory / name).read_bytes()
        covered = record.header_bytes
        assert zlib.crc32(data[:covered]) == record.header_crc32
        for tensor in (*manifest.tensors.values(), *manifest.generators.values()):
            for chunk in (chunk for chunk in tensor.chunks if chunk.file == name):
                assert chunk.crc32 == (zlib.crc32(data[chunk.offset : chunk.offset + chunk.num_bytes]),)
                covered += chunk.num_bytes
        assert covered == record.size_bytes == len(data)


def load_with_torch_alone(run_dir, directory):
    """What torch's own reader makes of a checkpoint's directory, beside what we make of it."""
    model, optimizer = build("fsdp2", model_seed=1)
    live = get_live_state(model, optimizer)
    load(live, storage_reader=HuggingFaceStorageReader(directory))
    ours = build("fsdp2", model_seed=2)
    do_restore(run_dir, *ours)
    return get_values(model, optimizer), get_values(*ours)


def test_torch_reads_a_checkpoint_without_us(tmp_path):
    (saved, *_), *_ = run_ranks(train_and_save, 3, tmp_path, "fsdp2")
    _, directory = get_manifest(tmp_path)
    for theirs, ours in run_ranks(load_with_torch_alone, 2, tmp_path, str(directory)):
        assert theirs == ours == saved[3]


def save_while_busy(run_dir):
    may_finish = threading.Event()
    before_commit = may_finish.wait if dist.get_rank() == 1 else lambda: None
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir, before_commit=before_commit)
    started = checkpointer.start_save(model, optimizer, progress=make_progress(1), extra={})
    for _ in range(5):
        checkpointer.poll()
    again = checkpointer.start_save(model, optimizer, progress=make_progress(2), extra={})
    newest = checkpointer.poll()
    may_finish.set()
    checkpointer.finish()
    third = checkpointer.start_save(model, optimizer, progress=make_progress(3), extra={})
    return started, again, newest, third, checkpointer.finish()


def test_a_save_is_skipped_by_all_ranks_while_one_rank_still_writes(tmp_path):
    assert run_ranks(save_while_busy, 2, tmp_path) == [(True, False, None, True, make_progress(3))] * 2


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_on_write(is_last):
    write, put_new = LocalStorage.write, LocalStorage.put_new

    def write_or_die(self, key, chunks):
        return die() if is_last(key) else write(self, key, chunks)

    def put_or_die(self, key, data):
        return die() if is_last(key) else put_new(self, key, data)

    LocalStorage.write, LocalStorage.put_new = write_or_die, put_or_die


def die_while_pruning():
    delete = LocalStorage.delete

    def delete_or_die(self, keys):
        keys = list(keys)
        return die() if any("step-00000001/e" in key for key in keys) else delete(self, keys)

    LocalStorage.delete = delete_or_die


DEATHS = {
    "among the shards": (lambda: die_on_write(lambda key: key.endswith("00000.safetensors")), [1]),
    "before the manifest": (lambda: die_on_write(lambda key: key.endswith(MANIFEST)), [1]),
    "before COMMITTED": (lambda: die_on_write(lambda key: key.endswith(COMMITTED)), [1]),
    "while pruning": (die_while_pruning, [2]),
}


def save_until_killed(run_dir, death):
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir, replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, keep_last=1)))
    train(model, optimizer, 1, 1)
    checkpointer.save_now(model, optimizer, progress=make_progress(1), extra={})
    dist.barrier()  # rank 0 prunes after the others are done
    if dist.get_rank() == 0:
        DEATHS[death][0]()
    train(model, optimizer, 2, 2)
    try:
        checkpointer.save_now(model, optimizer, progress=make_progress(2), extra={})
        return "committed"
    except (StorageError, CheckpointError):
        raise
    except RuntimeError as error:  # what a broken connection raises
        checkpointer.close()
        return type(error).__name__


def resume_and_save(run_dir):
    model, optimizer = build("fsdp2", model_seed=1)
    resumed = do_restore(run_dir, model, optimizer).progress.step
    checkpointer = make_checkpointer(run_dir)
    train(model, optimizer, resumed + 1, 2)
    checkpointer.save_now(model, optimizer, progress=make_progress(2), extra={})
    return resumed, get_values(model, optimizer)


@pytest.mark.parametrize("death", DEATHS)
def test_a_kill_during_a_save_leaves_the_newest_committed_one(tmp_path, death):
    survivors = run_ranks(save_until_killed, 2, tmp_path, death)
    steps = DEATHS[death][1]
    assert survivors[0] is None
    assert survivors[1] == ("committed" if steps == [2] else survivors[1])
    assert get_steps(tmp_path) == steps
    resumed = run_ranks(resume_and_save, 2, tmp_path)
    assert resumed[0][0] == steps[-1]
    assert get_steps(tmp_path)[-1] == 2
    assert resumed[0][1] == run_ranks(resume_and_save, 1, tmp_path)[0][1]


def limit_file_size(_run_dir):
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def fill_storage(run_dir):
    if dist.get_rank() == 0:
        with Path(run_dir, "ballast").open("wb", buffering=0) as file:
            file.write(bytes(2**20))


def with_max_failed_saves(number):
    return replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, max_failed_saves=number))


def save_on_failing_storage(run_dir, break_storage, wait):
    model, optimizer = build("fsdp2", make_model=Wide)
    checkpointer = make_checkpointer(run_dir, config=with_max_failed_saves(1))
    assert checkpointer.save_now(model, optimizer, progress=make_progress(1), extra={})
    break_storage(run_dir)
    assert checkpointer.start_save(model, optimizer, progress=make_progress(2), extra={})
    num_polls = 0
    with pytest.raises(StorageError) as caught:
        if wait == "finish":
            checkpointer.finish()
        while True:
            dist.barrier()
            num_polls += 1
            checkpointer.poll()
    checkpointer.close()
    return num_polls, str(caught.value)


@pytest.mark.parametrize("wait", ["poll", "finish"])
def test_storage_that_fails_on_one_rank_is_an_error_on_all_at_the_same_poll(tmp_path, wait):
    failures = run_ranks(save_on_failing_storage, 2, tmp_path, limit_file_size, wait)
    assert failures[0] == failures[1]
    assert "File too large" in failures[0][1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert get_steps(tmp_path) == [1]


def test_a_full_disk_ends_the_save_and_the_older_checkpoint_still_loads(tmp_path):
    if os.system(f"mount -t tmpfs -o size=1100k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        failures = run_ranks(save_on_failing_storage, 2, tmp_path, fill_storage, "finish")
        assert "No space left on device" in failures[0][1]
        assert failures[0] == failures[1]
        assert get_steps(tmp_path) == [1]
        assert run_ranks(restore_wide, 1, tmp_path) == [1]
    finally:
        os.system(f"umount {tmp_path}")


def save_through_a_full_disk(run_dir):
    """Six saves, of which the second to fourth fail; then, three that fail in a row are too many."""
    control = Path(run_dir).with_suffix(".faults")
    os.environ[FAULTS_VARIABLE] = str(control)
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir, config=with_max_failed_saves(3))
    committed = []

    def save(step, *, full):
        dist.barrier()
        if dist.get_rank() == 0 and full:
            write_fault(control, Fault(kind="full"))
        elif dist.get_rank() == 0:
            control.unlink(missing_ok=True)
        dist.barrier()
        if checkpointer.save_now(model, optimizer, progress=make_progress(step), extra={}):
            committed.append(step)

    for step in range(1, 7):
        save(step, full=step in (2, 3, 5))
    with pytest.raises(SavesFailedError) as caught:
        for step in range(7, 20):
            save(step, full=True)
    checkpointer.close()
    return committed, step, str(caught.value)


def test_training_goes_on_without_saves_that_fail_until_too_many_have_failed_in_a_row(tmp_path):
    outcomes = run_ranks(save_through_a_full_disk, 2, tmp_path / "run")
    assert outcomes[0] == outcomes[1]
    committed, ended_at, message = outcomes[0]
    assert (committed, ended_at) == ([1, 4, 6], 9)
    assert "the last 3 saves failed (checkpoint.max_failed_saves=3)" in message
    assert "No space left on device" in message
    assert get_steps(tmp_path / "run") == [4, 6]  # keep_last=2


def save_last_through_a_full_disk(run_dir):
    control = Path(run_dir).with_suffix(".faults")
    os.environ[FAULTS_VARIABLE] = str(control)
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir)
    if dist.get_rank() == 0:
        write_fault(control, Fault(kind="full", until_s=time.time() + 1))
    dist.barrier()
    return checkpointer.save_last(model, optimizer, progress=make_progress(1), extra={})


def test_the_last_save_is_tried_again_until_it_is_committed(tmp_path):
    assert run_ranks(save_last_through_a_full_disk, 2, tmp_path / "run") == [True, True]
    assert get_steps(tmp_path / "run") == [1]


class SlowStager(Stager):
    def __init__(self, buffers, copied):
        super().__init__(buffers)
        self.copied = copied

    def stage(self, live, layout, held, *, index):
        staged = super().stage(live, layout, held, index=index)
        object.__setattr__(staged, "wait_on_host", self.copied.wait)
        return staged


def save_without_memory(run_dir):
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir)

    def refuse(num_bytes):
        raise CheckpointError(f"{num_bytes} bytes were refused")

    checkpointer._buffers.reserve = refuse
    said = []
    for _ in range(2):
        with pytest.raises(CheckpointError, match="were refused") as error:
            checkpointer.start_save(model, optimizer, progress=make_progress(1), extra={})
        said.append(str(error.value))
    checkpointer.close()
    return said


def test_memory_that_is_refused_is_an_error_and_not_waited_for(tmp_path):
    ((first, second),) = run_ranks(save_without_memory, 1, tmp_path)
    assert first == second
    assert list(tmp_path.iterdir()) == []


def close_while_saving(run_dir):
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir)
    copied = threading.Event()
    checkpointer._stager = SlowStager(checkpointer._buffers, copied)
    checkpointer.start_save(model, optimizer, progress=make_progress(1), extra={})
    checkpointer.close()
    copied.set()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "save-storage")
    thread.join(20)
    return thread.is_alive()


def test_a_save_given_up_touches_the_storage_no_more(tmp_path):
    assert run_ranks(close_while_saving, 1, tmp_path) == [False]
    assert list(tmp_path.iterdir()) == []


def close_beside_a_silent_peer(run_dir):
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir)
    dist.barrier()
    start_s = time.monotonic()
    if dist.get_rank() == 0:
        checkpointer.start_save(model, optimizer, progress=make_progress(1), extra={})
        checkpointer.poll()
    checkpointer.close()
    return time.monotonic() - start_s


def test_closing_does_not_wait_for_a_peer_that_never_answers(tmp_path):
    assert max(run_ranks(close_beside_a_silent_peer, 2, tmp_path)) < 5
    assert get_steps(tmp_path) == []


def restore_wide(run_dir):
    return do_restore(run_dir, *build("single", make_model=Wide)).progress.step


def restore_step(run_dir, config=CONFIG):
    try:
        return do_restore(run_dir, *build("fsdp2"), config).progress.step
    except (CheckpointError, ConfigError) as error:
        return str(error)


def damage(run_dir, step, name, change):
    path = run_dir / "checkpoints" / f"step-{step:08d}" / name
    path.write_bytes(change(path.read_bytes()))


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(tmp_path):
    run_ranks(train_and_save, 2, tmp_path, "fsdp2", (2, 4))
    damage(tmp_path, 4, "e00000001-00001.safetensors", lambda data: data[:-1])
    assert run_ranks(restore_step, 2, tmp_path) == [2, 2]
    damage(
        tmp_path, 2, "e00000001-00000.safetensors", lambda data: bytes(len(data))
    )  # of the right size: found while loading
    errors = run_ranks(restore_step, 2, tmp_path)
    assert errors[0] == errors[1]
    assert "none of the 2 committed checkpoints" in errors[0]


def test_a_run_that_would_see_other_samples_is_refused_on_all_ranks(tmp_path):
    run_ranks(train_and_save, 1, tmp_path, "fsdp2")
    errors = run_ranks(restore_step, 2, tmp_path, replace(CONFIG, train=TrainConfig(seed=7)))
    assert errors[0] == errors[1]
    assert "train.seed=7" in errors[0]


def test_a_model_of_another_shape_is_refused_before_anything_is_loaded(tmp_path):
    run_ranks(save_wide, 1, tmp_path, "fsdp2")
    (error,) = run_ranks(restore_step, 1, tmp_path)
    assert "model.embed.weight has the shape (4, 7) now, but None in the checkpoint" in error
