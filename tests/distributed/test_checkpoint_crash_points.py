"""Killed with -9 before any single I/O operation of its saves, a run goes on from what had been committed."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.restore.load import restore
from elastic.storage import open_storage
from tests.distributed._crash_points import count_operations, run_forked
from tests.distributed._spawn_ckpt import CONFIG, CPU, build, get_values, make_progress, run_ranks
from tests.distributed._spawn_ckpt import train as train_steps

STEPS = (1, 2, 3)


def list_operations(kind):
    """Return the functions that reach the storage, each with what has it."""
    if kind == "local":
        paths = ("rename", "hardlink_to", "unlink", "rmdir", "mkdir")
        return [*((os, name) for name in ("open", "write", "fsync")), *((Path, name) for name in paths)]
    import obstore

    return [(obstore, name) for name in ("put", "get", "head", "list", "delete")]


def save_three(say, url, kind, fatal):
    """Save three times; say each step whose save returned, and each operation."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    count_operations(list_operations(kind), fatal, say)
    model, optimizer = build("single")
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, keep_last=1))
    checkpointer = Checkpointer(open_storage(url), config, device=CPU, generation=1)
    for step in STEPS:
        train_steps(model, optimizer, step, step)
        checkpointer.save_now(model, optimizer, progress=make_progress(step), extra={})
        if checkpointer.finish() == make_progress(step):
            say(f"{step}")
        for thread in threading.enumerate():
            if thread.name == "save-storage":
                thread.join()  # it prunes after the commit


def run(url, kind, fatal):
    """Return the last step whose save returned, and the operations, of a process that dies at one of them."""
    lines, _ = run_forked(save_three, url, kind, fatal)
    steps = [int(line) for line in lines if line.isdigit()]
    return max(steps, default=0), [line for line in lines if not line.isdigit()]


def kill_everywhere(_run_dir, base, kind, environment):
    """Return the operations of a whole run, what loads after a kill before each of them, and what should."""
    os.environ |= environment  # that of the fork server is older than the S3 server
    dist.destroy_process_group()  # children make groups of their own
    operations = run(f"{base}/whole", kind, None)[1]
    returned = [run(f"{base}/{fatal}", kind, fatal)[0] for fatal in range(len(operations))]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loaded = []
    for fatal in range(len(operations)):
        model, optimizer = build("single", model_seed=1)
        restored = restore(open_storage(f"{base}/{fatal}"), model, optimizer, config=CONFIG, device=CPU)
        loaded.append((restored.progress.step, get_values(model, optimizer)) if restored else (0, None))
    model, optimizer = build("single")
    expected = {0: None}
    for step in STEPS:
        train_steps(model, optimizer, step, step)
        expected[step] = get_values(model, optimizer)
    return operations, returned, loaded, expected


def get_environment():
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_kill_before_any_operation_loses_no_save_that_had_returned(kind, tmp_path, request, capsys):
    base = tmp_path if kind == "local" else request.getfixturevalue("s3_url")
    ((operations, returned, loaded, expected),) = run_ranks(
        kill_everywhere, 1, tmp_path, str(base), kind, get_environment()
    )
    for point, (operation, returned_step, (step, values)) in enumerate(zip(operations, returned, loaded, strict=True)):
        assert returned_step <= step <= returned_step + 1, f"killed before operation {point}, {operation}"
        assert values == expected[step], f"killed before operation {point}, {operation}"
    assert set(returned) == {0, 1, 2}, "points lie in all three saves"
    with capsys.disabled():
        counts = ", ".join(f"{operations.count(name)} {name}" for name in dict.fromkeys(operations))
        print(f"\n{kind}: killed before each of {len(operations)} operations ({counts})")
