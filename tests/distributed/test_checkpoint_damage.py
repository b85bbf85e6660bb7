"""Whatever happens to a file of a checkpoint is found by who loads it and by `solvent checkpoint verify`."""

import json
import logging
import shutil

import pytest

from cluster.cli import main
from elastic.checkpoint.format.manifest import COMMITTED, MANIFEST
from elastic.errors import CheckpointError
from tests.distributed._spawn_ckpt import build, do_restore, get_values, make_checkpointer, make_progress, run_ranks
from tests.distributed._spawn_ckpt import train as train_steps

SHARDS = ("e00000001-00000.safetensors", "e00000001-00001.safetensors")
OLDER, NEWER = "step-00000002", "step-00000004"


def save_two(run_dir):
    model, optimizer = build("fsdp2")
    checkpointer = make_checkpointer(run_dir)
    values = {}
    for step in (2, 4):
        train_steps(model, optimizer, step - 1, step)
        checkpointer.save_now(model, optimizer, progress=make_progress(step), extra={})
        values[step] = get_values(model, optimizer)
    checkpointer.close()
    return values


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def restore_each(_run_dir, run_dirs):
    """Load each of these runs onto one model; return step, values and warnings."""
    model, optimizer = build("fsdp2", model_seed=1)
    handler = Warnings()
    logging.getLogger("elastic.checkpoint.restore.load").addHandler(handler)
    results = []
    for run_dir in run_dirs:
        handler.texts = []
        try:
            step = do_restore(run_dir, model, optimizer).progress.step
        except CheckpointError as error:
            step = str(error)
        results.append((step, get_values(model, optimizer), " ".join(handler.texts)))
    return results


def flip(directory, name, at):
    data = bytearray((directory / name).read_bytes())
    data[at] ^= 0x10
    (directory / name).write_bytes(data)


def swap(directory):
    first, second = (directory / name for name in SHARDS)
    first.rename(directory / "aside")
    second.rename(first)
    (directory / "aside").rename(second)


def find_tensor(directory, name, tensor):
    header = (directory / name).read_bytes()
    length = int.from_bytes(header[:8], "little")
    return 8 + length + json.loads(header[8 : 8 + length])[tensor]["data_offsets"][0]


def flip_in(name, tensor):
    return lambda directory: flip(directory, name, find_tensor(directory, name, tensor))


# what is done to the newest checkpoint -> what a warning and `verify` must name
DAMAGES = {
    "weight": (flip_in(SHARDS[1], "model.hidden.weight"), (SHARDS[1], "model.hidden.weight", "checksum")),
    "moment": (flip_in(SHARDS[0], "optim.embed.weight.exp_avg"), (SHARDS[0], "optim.embed.weight.exp_avg")),
    "generator": (flip_in(SHARDS[1], "rng.cpu.1"), (SHARDS[1], "rng.cpu.1")),
    "header": (lambda directory: flip(directory, SHARDS[0], 20), (SHARDS[0], "header")),
    "last byte": (lambda directory: flip(directory, SHARDS[1], -1), (SHARDS[1],)),
    "truncated": (lambda d: (d / SHARDS[0]).write_bytes((d / SHARDS[0]).read_bytes()[:-1]), (SHARDS[0], "instead of")),
    "swapped": (swap, (SHARDS[0],)),
    "deleted": (lambda directory: (directory / SHARDS[1]).unlink(), (f"{SHARDS[1]} is missing",)),
    "of another step": (lambda d: shutil.copy(d.parent / OLDER / SHARDS[0], d / SHARDS[0]), (SHARDS[0], "checksum")),
    # these make it invisible to who loads: nothing warns, and `verify` tells
    "manifest": (lambda directory: flip(directory, MANIFEST, 100), ()),
    "COMMITTED": (lambda directory: flip(directory, COMMITTED, 0), ()),
    "no manifest": (lambda directory: (directory / MANIFEST).unlink(), ()),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved")
    return run_dir, run_ranks(save_two, 2, run_dir)[0]


@pytest.mark.parametrize("num_ranks", [2, 1])
def test_damage_is_found_named_and_passed_over(saved, tmp_path, num_ranks):
    run_dir, values = saved
    runs = {}
    for kind, (do_damage, _) in DAMAGES.items():
        runs[kind] = shutil.copytree(run_dir, tmp_path / kind)
        do_damage(runs[kind] / "checkpoints" / NEWER)
    (results, *_) = run_ranks(restore_each, num_ranks, tmp_path, [*runs.values(), run_dir])
    for (kind, (_, names)), (step, restored, warnings) in zip(DAMAGES.items(), results, strict=False):
        assert step == 2, kind
        assert restored == values[2], f"{kind}: a part of another state is left"
        for name in names:
            assert name in warnings, f"{kind}: {warnings}"
    assert (results[-1][0], results[-1][1]) == (4, values[4])


def verify(run_dir, capsys):
    code = main(["checkpoint", "verify", str(run_dir), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_verify_finds_the_same(saved, tmp_path, capsys):
    run_dir, _ = saved
    code, told = verify(run_dir, capsys)
    assert (code, told["newest_is_whole"]) == (0, True)
    assert [(row["name"], row["state"], row["notes"]) for row in told["checkpoints"]] == [
        (OLDER, "whole", []),
        (NEWER, "whole", []),
    ]
    for kind, (do_damage, names) in DAMAGES.items():
        copy = shutil.copytree(run_dir, tmp_path / kind)
        do_damage(copy / "checkpoints" / NEWER)
        code, told = verify(copy, capsys)
        older, newer = told["checkpoints"]
        assert (code, older["state"], newer["state"]) == (1, "whole", "damaged"), kind
        for name in names:
            assert name in " ".join(newer["notes"]), kind


def test_every_directory_is_shown_for_what_it_is(saved, tmp_path, capsys):
    copy = shutil.copytree(saved[0], tmp_path / "run")
    checkpoints = copy / "checkpoints"
    for name, file in (
        ("step-00000006", SHARDS[0]),
        ("step-00000008", "e00000003-00000.safetensors"),
        ("notes", "a.txt"),
        (NEWER, "e00000002-00000.safetensors"),
    ):
        (checkpoints / name).mkdir(exist_ok=True)
        (checkpoints / name / file).write_bytes(b"half")
    (copy / "epochs").mkdir()
    (copy / "epochs" / "00000003").write_text("{}")
    assert main(["checkpoint", "ls", str(copy), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checkpoints"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        OLDER: "whole",
        NEWER: "whole",
        "step-00000006": "stale",
        "step-00000008": "unfinished",
        "notes": "foreign",
    }
    assert rows[NEWER]["notes"] == ["e00000002-00000.safetensors is left over from another attempt"]
    assert (rows[NEWER]["step"], rows[NEWER]["world_size"], rows[NEWER]["attempt"]) == (4, 2, 1)
    assert rows[NEWER]["bytes"] == sum(path.stat().st_size for path in (checkpoints / NEWER).iterdir())
    assert 0 <= rows[NEWER]["age_s"] < 600
    assert main(["checkpoint", "verify", str(copy)]) == 0
    assert "the newest is whole" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["checkpoint"])


def test_a_run_without_checkpoints_is_not_whole(tmp_path, capsys):
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "none is committed" in capsys.readouterr().out
