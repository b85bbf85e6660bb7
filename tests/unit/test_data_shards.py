import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import DataConfig, RunConfig
from elastic.data.corpus import open_corpus
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared import checksums as verify
from elastic.data.prepared.shards import open_dataset
from elastic.errors import DataError
from elastic.models.llama import Config as ModelConfig

SHARD_TOKENS = 50


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"Line {i} of a text, {i * i} in its square."}) for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "out", vocab_size=300, val_fraction=0.2, shard_tokens=SHARD_TOKENS)
    return folder / "out"


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def read_stream(folder, split):
    shards = getattr(open_dataset(folder).info, split).shards
    tables = [pa.ipc.open_file(str(folder / shard.file)).read_all() for shard in shards]
    return np.concatenate([table["tokens"].combine_chunks().flatten().to_numpy() for table in tables])


@given(seq_len=st.integers(1, 3 * SHARD_TOKENS), split=st.sampled_from(["train", "val"]))
def test_samples_tile_the_stream_and_share_their_border_token(made, seq_len, split):
    dataset = open_dataset(made)
    stream = read_stream(made, split)
    num_samples = dataset.num_samples(split, seq_len)
    assert num_samples * seq_len + 1 <= len(stream) < (num_samples + 1) * seq_len + 1
    for i in range(num_samples):
        np.testing.assert_array_equal(dataset.read(split, i, seq_len), stream[i * seq_len : (i + 1) * seq_len + 1])


def read_first_shard(dataset):
    return dataset.folder.read_tokens(dataset.info.train.shards[0], 0, SHARD_TOKENS)


def test_a_sample_outside_the_split_is_refused(made):
    dataset = open_dataset(made)
    for sample_id in (-1, dataset.num_samples("train", 8)):
        with pytest.raises(IndexError):
            dataset.read("train", sample_id, 8)


def test_tokens_are_read_from_the_mapped_file_without_a_copy(made):
    tokens = read_first_shard(open_dataset(made))
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert tokens.dtype == np.uint16


def flip_bit(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("position", [300, -100])
def test_one_flipped_bit_is_found_at_the_next_start(data, position):
    open_dataset(data)
    shard = data / "train-00002.arrow"
    flip_bit(shard, position % shard.stat().st_size)
    with pytest.raises(DataError, match=r"train-00002\.arrow is corrupt"):
        open_dataset(data)


def test_a_copy_that_was_corrupted_on_the_way_is_found_though_the_stamp_came_with_it(made, tmp_path):
    open_dataset(made)
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copy2)  # keeps the modification times
    path = tmp_path / "copy" / "val-00000.arrow"
    flip_bit(path, 400)
    shutil.copystat(made / "val-00000.arrow", path)
    with pytest.raises(DataError, match="corrupt"):
        open_dataset(tmp_path / "copy")


def count_hashed(monkeypatch):
    hashed = []
    real = verify.hash_file
    monkeypatch.setattr(verify, "hash_file", lambda path: (hashed.append(path.name), real(path))[1])
    return hashed


def test_shards_are_hashed_once_per_copy_and_not_at_every_start(data, monkeypatch):
    hashed = count_hashed(monkeypatch)
    num_shards = len(list(data.glob("*.arrow")))
    open_dataset(data)
    assert len(hashed) == num_shards + 1  # and the tokenizer
    hashed.clear()
    open_dataset(data)
    assert hashed == ["tokenizer.json"]
    hashed.clear()
    open_dataset(data, verify="all")
    assert len(hashed) == num_shards + 1


def test_the_machine_that_prepared_the_data_does_not_hash_it_again(made, monkeypatch):
    hashed = count_hashed(monkeypatch)
    open_dataset(made)
    assert hashed == ["tokenizer.json"]


def test_a_folder_that_cannot_be_written_keeps_its_stamp_elsewhere(data, monkeypatch, tmp_path):
    monkeypatch.setattr(verify.tempfile, "gettempdir", lambda: str(tmp_path))
    (data / ".verified.json").unlink()
    (data / ".verified.json").mkdir()  # what root cannot write either
    hashed = count_hashed(monkeypatch)
    open_dataset(data)
    hashed.clear()
    open_dataset(data)
    assert hashed == ["tokenizer.json"]


def truncate(data):
    path = data / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:-9])


def edit(name, old, new):
    def change(data):
        text = (data / name).read_text()
        assert old in text
        (data / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cut short"),
        (lambda data: (data / "val-00000.arrow").unlink(), "missing"),
        (lambda data: (data / "tokenizer.json").unlink(), "not the file that the shards were made with"),
        (edit("tokenizer.json", "Line", "line"), "not the file that the shards were made with"),
        (edit("dataset.json", '"version": 1', '"version": 9'), "version 9"),
        (edit("dataset.json", '"eot_id"', '"eot"'), "damaged"),
        (edit("dataset.json", "}", ""), "damaged"),
        (lambda data: (data / "dataset.json").write_text("[]"), "damaged"),
        (lambda data: (data / "dataset.json").unlink(), "not a prepared folder"),
        (shutil.rmtree, "does not exist.*solvent prepare"),
    ],
)
def test_damage_is_named_at_the_start(data, damage, message):
    damage(data)
    with pytest.raises(DataError, match=message):
        open_dataset(data)


def test_an_empty_path_says_how_to_make_data():
    with pytest.raises(DataError, match="solvent prepare"):
        open_dataset("")


def config(path, *, vocab_size=300, seq_len=8):
    return RunConfig(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(path=str(path), seq_len=seq_len))


def test_data_that_fits_is_accepted(made):
    open_corpus(config(made)).check_fits()


def test_a_model_without_a_row_for_every_token_is_refused(made):
    with pytest.raises(DataError, match=r"model\.vocab_size=299.*Set model\.vocab_size=300"):
        open_corpus(config(made, vocab_size=299)).check_fits()


def test_a_sequence_longer_than_a_split_is_refused_with_the_longest_that_fits(made):
    dataset = open_dataset(made)
    longest = dataset.info.val.num_tokens - 1
    open_corpus(config(made, seq_len=longest)).check_fits()
    with pytest.raises(DataError, match=rf"val split.*data\.seq_len to at most {longest}"):
        open_corpus(config(made, seq_len=longest + 1)).check_fits()
