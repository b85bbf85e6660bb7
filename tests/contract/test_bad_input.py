"""Wrong input, through the commands that users type: refused at once, explained, and nothing saved is harmed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.forked import Elastic

ROOT = Path(__file__).parents[2]
SOLVENT = [sys.executable, "-c", "from cluster.cli import enter; enter()"]
ELASTIC = [sys.executable, "-m", "elastic"]
CONFIG = """
run: saved
device: cpu
model: {dim: 16, num_layers: 1, num_heads: 1, num_kv_heads: 1, ffn_dim: 16, vocab_size: 300}
data: {seq_len: 16}
train: {steps: 2, global_batch: 4, micro_batch: 4, eval_samples: 4}
wandb: {mode: disabled}
"""


class Place(NamedTuple):
    """A configuration, prepared data, and a run that has trained with them to its end."""

    config: Path
    data: Path
    storage: Path

    @property
    def run(self) -> Path:
        return self.storage / "saved"


def start(command, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if command is ELASTIC:
        return Elastic(*arguments, environment=environment)
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(command, *arguments, **environment):
    with start(command, *arguments, **environment) as process:
        out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "config.yaml").write_text(CONFIG)
    text = "\n\n".join(
        f"{n} sheep and {n * n} goats went over the hill to see what they could see." for n in range(500)
    )
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")))
    place = Place(folder / "config.yaml", folder / "data", folder / "runs")
    made = call(SOLVENT, "prepare", folder / "text.jsonl", "--out", place.data, "--vocab-size", "300")
    assert made.returncode == 0, made.stderr
    trained = call(ELASTIC, place.config, f"storage={place.storage}", f"data.path={place.data}")
    assert trained.returncode == 0, trained.stderr
    return place


@pytest.fixture
def no_ray(tmp_path):
    """A `ray` that cannot be imported: proof that nothing of a cluster is touched."""
    (tmp_path / "fake" / "ray").mkdir(parents=True)
    (tmp_path / "fake" / "ray" / "__init__.py").write_text("raise RuntimeError('Ray was imported')")
    return {"PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{ROOT}"}


def read_tree(folder):
    """Return the content of every file but those that may tell of the attempt that was refused."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    of_attempt = ("attempts.jsonl", "leader.json")
    return {
        path: file.read_bytes()
        for path, file in files.items()
        if path.name not in of_attempt and path.parent.name != "epochs"
    }


def assert_explained(result, *parts):
    """The value, why it cannot work and what to type instead, in one line."""
    assert result.returncode == 2, result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith(("solvent: ", "rank 0: "))]
    assert len(message) == 1, result.stderr
    assert [part for part in parts if part not in message[0]] == [], message[0]
    assert "Traceback" not in result.stderr


def copy_data(saved, tmp_path):
    return shutil.copytree(saved.data, tmp_path / "copy")


def flip_a_byte(saved, tmp_path):
    path = next(copy_data(saved, tmp_path).glob("train-*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return [f"data.path={path.parent}"], (str(path), "is corrupt: its sha256 is", "Copy the folder again")


def cut_a_shard(saved, tmp_path):
    path = next(copy_data(saved, tmp_path).glob("train-*.arrow"))
    size = path.stat().st_size
    os.truncate(path, size - 100)
    return [f"data.path={path.parent}"], (str(path), f"{size - 100} bytes", f"says {size}", "Copy the folder again")


def change_the_tokenizer(saved, tmp_path):
    path = copy_data(saved, tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace('"sheep"', '"ships"') + "\n")
    return [f"data.path={path.parent}"], (str(path), "their tokens would mean other text", "Put the old file back")


def name_missing_data(saved, tmp_path):
    path = tmp_path / "none"
    return [f"data.path={path}"], (f"data.path='{path}'", "does not exist", "solvent prepare INPUT")


def ask_for_too_long_sequences(saved, tmp_path):
    num_tokens = json.loads((saved.data / "dataset.json").read_text())["val"]["num_tokens"]
    why = f"the val split of {saved.data} has {num_tokens}"
    return ["data.seq_len=99999"], ("data.seq_len=99999", why, f"at most {num_tokens - 1}")


def mistype_a_key(saved, tmp_path):
    return ["train.step=3"], ("train.step='3'", "there is no such key", "Did you mean train.steps?")


def want_more_workers_than_allowed(saved, tmp_path):
    return ["cluster.min_workers=3"], ("cluster.min_workers=3", "more than cluster.max_workers=1", "Lower the first")


def share_a_batch_among_too_many(saved, tmp_path):
    values = ["cluster.max_workers=5"]
    return values, ("train.global_batch=4", "some ranks would have no sample", "Set train.global_batch to at least 5")


def store_under_a_file(saved, tmp_path):
    path = tmp_path / "file"
    path.touch()
    return [f"storage={path}"], (f"storage: {path}", "Not a directory", "A file is in the way")


def name_a_run_like_a_file(saved, tmp_path):
    path = saved.storage / "notes"
    path.touch()
    return ["run=notes"], (f"storage: {path}", "Not a directory", "A file is in the way")


def change_the_model_of_a_saved_run(saved, tmp_path):
    why = "the saved weights have another shape"
    return ["model.ffn_dim=32"], ("model.ffn_dim=32", why, "Set model.ffn_dim=16 to resume")


def change_the_samples_of_a_saved_run(saved, tmp_path):
    return ["train.seed=1"], ("train.seed=1", "samples would be left out or repeated", "Set train.seed=0 to resume")


MISTAKES = [
    name_missing_data,
    change_the_tokenizer,
    flip_a_byte,
    cut_a_shard,
    ask_for_too_long_sequences,
    mistype_a_key,
    want_more_workers_than_allowed,
    share_a_batch_among_too_many,
    store_under_a_file,
    name_a_run_like_a_file,
    change_the_model_of_a_saved_run,
    change_the_samples_of_a_saved_run,
]


@pytest.mark.parametrize("command", [[*SOLVENT, "train"], ELASTIC], ids=["solvent", "elastic"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_explained_and_harms_nothing_before_any_cluster_starts(saved, tmp_path, no_ray, mistake, command):
    before = read_tree(saved.run)
    overrides, parts = mistake(saved, tmp_path)
    where = (f"storage={saved.storage}", f"data.path={saved.data}", "train.steps=4")  # a finished run needs no head
    assert_explained(call(command, saved.config, *where, *overrides, **no_ray), *parts)
    assert read_tree(saved.run) == before


def test_under_torchrun_a_mistake_is_explained_by_each_rank_without_a_traceback_of_ours(saved, tmp_path):
    """torchrun adds a report of its own, and its own exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "elastic"]
    result = call(torchrun, saved.config, f"storage={saved.storage}", f"data.path={tmp_path / 'none'}", "strategy=ddp")
    assert result.returncode != 0
    assert f"rank 0: data.path='{tmp_path / 'none'}' does not exist" in result.stderr
    assert "elastic/training/run.py" not in result.stderr


@pytest.fixture
def silent_port():
    """A port that takes connections and never says a word, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("http://127.0.0.1:8265", ("is a dashboard's address", "solvent submit --to ray")),
        ("ray://127.0.0.1:10001", ("is for clients outside", "Set RAY_ADDRESS=HOST:6379")),
        ("127.0.0.1:{closed}", ("nobody listens there", "unset it to train on this machine")),
        ("127.0.0.1:{silent}", ("nothing answers within 10 s", "unset it to train on this machine")),
    ],
)
def test_the_address_of_no_head_is_explained_within_seconds(saved, silent_port, address, parts):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    address = address.format(closed=closed, silent=silent_port)
    start_s = time.monotonic()
    where = (f"storage={saved.storage}", f"data.path={saved.data}", "train.steps=4")  # a finished run needs no head
    result = call(SOLVENT, "train", saved.config, *where, RAY_ADDRESS=address)
    assert_explained(result, f"RAY_ADDRESS={address}", *parts)
    assert time.monotonic() - start_s < 60  # 10 s, and imports on a busy machine; Ray's own wait is minutes


def test_ctrl_c_ends_the_wait_for_a_head(saved, silent_port):
    where = (f"storage={saved.storage}", f"data.path={saved.data}", "train.steps=4")  # a finished run needs no head
    with start(SOLVENT, "train", saved.config, *where, RAY_ADDRESS=f"127.0.0.1:{silent_port}") as process:
        wanted = f"0100007F:{silent_port:04X}"  # 127.0.0.1 and the port, as the peer of a connection
        while not any(line.split()[2] == wanted for line in Path("/proc/net/tcp").read_text().splitlines()[1:]):
            assert process.poll() is None
            time.sleep(0.05)
        start_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert time.monotonic() - start_s < 5


def test_a_mistyped_demo_leaves_the_last_one_where_it_is(saved, no_ray):
    before = read_tree(saved.run)
    result = call(SOLVENT, "demo", "--out", saved.run, "train.step=3", **no_ray)
    assert_explained(result, "train.step='3'", "there is no such key", "Did you mean train.steps?")
    assert read_tree(saved.run) == before
    assert not saved.run.with_name("saved-data").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("text.txt", "does not exist", "Check the name")),
        ("", ("hold no text", "files: 1, documents with text: 0)", "Name files with text in them")),
        (" \n\n\t\n", ("hold no text", "files: 1, documents with text: 0)", "Name files with text in them")),
    ],
    ids=["missing", "empty", "blank"],
)
def test_an_input_without_text_is_refused_by_prepare_and_leaves_nothing(tmp_path, no_ray, content, parts):
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    result = call(SOLVENT, "prepare", tmp_path / "text.txt", "--out", tmp_path / "data", **no_ray)
    assert_explained(result, *parts)
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == []


@pytest.fixture
def mount(saved, tmp_path):
    """Return a function that mounts something with a copy of the saved run's storage on it."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(*options):
        if subprocess.run(["mount", *options, place], check=False, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        shutil.copytree(saved.storage, place, dirs_exist_ok=True)
        return place

    yield mount
    subprocess.run(["umount", place], check=False, capture_output=True)


@pytest.mark.parametrize("command", [[*SOLVENT, "train"], ELASTIC], ids=["solvent", "elastic"])
def test_storage_that_is_read_only_is_explained(saved, mount, no_ray, command):
    place = mount("-t", "tmpfs", "tmpfs")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    before = read_tree(place)
    where = (f"storage={place}", f"data.path={saved.data}", "train.steps=4")  # a finished run writes nothing
    result = call(command, saved.config, *where, **no_ray)
    assert_explained(result, f"storage: {place}", "Read-only file system", "Mount it writable")
    assert read_tree(place) == before


def fill(place, *, left_bytes):
    """Write until so many bytes are left, in whole pages; fewer, if a run takes some meanwhile."""
    with suppress(OSError), (place / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(place).free - left_bytes))


@pytest.mark.parametrize("command", [[*SOLVENT, "train"], ELASTIC], ids=["solvent", "elastic"])
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(saved, mount, no_ray, command):
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    fill(place, left_bytes=32 << 10)
    before = read_tree(place)
    result = call(command, saved.config, f"storage={place}", f"data.path={saved.data}", "run=new", **no_ray)
    assert_explained(result, f"storage: {place / 'new'} has", "GiB free", "Free some space")
    assert read_tree(place) == before


@pytest.mark.parametrize("words", [[], ["train.steps=1"]], ids=["the same steps", "fewer steps"])
def test_a_run_that_has_finished_says_so_and_starts_nothing(saved, no_ray, words):
    places = [f"storage={saved.storage}", f"data.path={saved.data}"]
    result = call([*SOLVENT, "train"], saved.config, *places, *words, **no_ray)
    assert result.returncode == 0, result.stderr
    assert "finished: all steps done" in result.stdout and "nothing is started" in result.stdout
    result = call([*SOLVENT, "train", "--json"], saved.config, *places, *words, **no_ray)
    assert json.loads(result.stdout)["end"] == "finished"


def test_a_run_that_has_trained_waits_for_room_before_it_starts_again(saved, mount, no_ray):
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    fill(place, left_bytes=0)
    words = [f"storage={place}", f"data.path={saved.data}", "train.steps=1000"]
    with start([*SOLVENT, "train"], saved.config, *words, **no_ray) as command:
        told = command.stderr.readline()
        assert f"{place / 'saved'}" in told and told.endswith("Trying for 30 s.\n"), told
        assert command.poll() is None
        (place / "ballast").unlink()
        assert "Ray was imported" in command.communicate(timeout=60)[1]


def test_a_disk_that_fills_up_during_a_save_is_explained_and_the_older_checkpoint_still_loads(saved, mount):
    """What is left holds the tensors (72 KiB) and not the generators, the index and the rows beside them."""
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    fill(place, left_bytes=84 << 10)
    before = read_tree(place / "saved" / "checkpoints")
    arguments = (saved.config, f"storage={place}", f"data.path={saved.data}", "train.steps=4")
    result = call(ELASTIC, *arguments)
    assert result.returncode == 3, "saves are tried again, and the run is left resumable"
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("rank 0: ")]
    for part in (f"storage: {place}", "No space left on device", "Free some space"):
        assert part in told
    assert read_tree(place / "saved" / "checkpoints") == before
    (place / "ballast").unlink()
    again = call(ELASTIC, *arguments)
    assert again.returncode == 0, again.stderr
    assert "step 3/4" in again.stdout and "step 2/4" not in again.stdout


def test_a_disk_that_fills_up_between_saves_is_explained_and_the_run_goes_on_once_there_is_room(saved, mount):
    place = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs")
    metrics = place / "saved" / "metrics.jsonl"
    before, rows = read_tree(place / "saved" / "checkpoints"), metrics.read_bytes()
    where = (saved.config, f"storage={place}", f"data.path={saved.data}")
    with start(ELASTIC, *where, "train.steps=50000", "checkpoint.every_steps=50000") as training:
        while training.poll() is None and metrics.read_bytes() == rows:
            time.sleep(0.05)
        fill(place, left_bytes=0)
        out, err = training.communicate(timeout=100)
    result = subprocess.CompletedProcess(training.args, training.returncode, out, err)
    assert_explained(result, f"storage: {place}", "No space left on device", "start the same command again")
    assert metrics.read_bytes().startswith(rows)
    assert read_tree(place / "saved" / "checkpoints") == before
    (place / "ballast").unlink()
    again = call(ELASTIC, *where, "train.steps=3")
    assert again.returncode == 0, again.stderr
    assert "step 3/3" in again.stdout


def test_chaos_strikes_no_run_that_exists(saved, tmp_path):
    (tmp_path / "faults.yaml").write_text("- {at_step: 1, fault: kill}")
    before = read_tree(saved.run)
    where = (f"storage={saved.storage}", f"data.path={saved.data}", "--faults", tmp_path / "faults.yaml")
    result = call(SOLVENT, "chaos", saved.config, *where)
    assert_explained(result, "run='saved' has trained before", "chaos must see every sample", "run=saved-chaos")
    assert read_tree(saved.run) == before


def test_a_disk_that_fills_up_while_data_is_prepared_is_explained_and_nothing_is_left_on_it(mount, no_ray):
    """The shards of this text have 2 MiB and more."""
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    before = read_tree(place)
    result = call(SOLVENT, "prepare", "kjv:", "--out", place / "data", "--vocab-size", "300", **no_ray)
    assert_explained(result, f"{place / 'data'} cannot be written (No space left on device)", "with --out")
    assert read_tree(place) == before
