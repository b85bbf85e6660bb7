"""`solvent data`: what is in prepared data, samples of it as text, whether it is whole."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from cluster.cli import main
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.format import map_shard, read_info, write_info, write_shard

TEXTS = [f"Text {n}: {n * n} sheep went over the hill, one after the other." for n in range(200)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=400, val_fraction=0.1, shard_tokens=700)
    return folder / "data"


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def ask(capsys, *arguments):
    """Return the exit code and the JSON object of a call."""
    code = main(["data", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_ls_tells_what_the_shards_hold(made, capsys):
    code, listed = ask(capsys, "ls", made)
    (found,) = listed["sources"]
    info = read_info(made)
    rows = [row for shard in info.train.shards for row in pa.ipc.open_file(made / shard.file).read_all()["tokens"]]
    train = found["splits"]["train"]
    assert code == 0 and len(info.train.shards) > 2
    assert (train["tokens"], train["documents"]) == (sum(map(len, rows)), info.train.num_documents)
    assert train["documents"] + found["splits"]["val"]["documents"] == len(TEXTS)
    assert train["document_tokens"]["deciles"][-1] == max(map(len, rows))
    assert found["eot"] == "<|endoftext|>" and found["identity"] == info.identity.name


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_borders_shown_are_those_of_the_documents_whichever_shards_share_them(made, capsys, split):
    part = read_info(made).get_split(split)
    _, found = ask(capsys, "show", made, "--split", split, f"data.seq_len={part.num_tokens - 1}")
    passages = found["samples"][0]["passages"]
    assert [passage["begins"] and passage["ends"] for passage in passages] == [True] * part.num_documents
    assert {passage["text"].removesuffix("<|endoftext|>") for passage in passages} <= set(TEXTS)


def test_a_sample_that_begins_within_a_document_says_so(made, capsys):
    _, found = ask(capsys, "show", made, "--sample", "1", "data.seq_len=5")
    first = found["samples"][0]["passages"][0]
    assert not first["begins"] and any(first["text"].removesuffix("<|endoftext|>") in text for text in TEXTS)
    assert main(["data", "show", str(made), "--sample", "9999"]) == 2
    assert "--sample=9999 is not there: train of" in capsys.readouterr().err


def test_whole_data_is_whole(made, capsys):
    code, found = ask(capsys, "verify", made)
    assert code == 0 and found["is_whole"]
    assert [(row["path"], row["damage"]) for row in found["sources"]] == [(str(made), [])]


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(data, change):
    """Put another first shard there, whose checksum is right."""
    info = read_info(data)
    path = data / info.train.shards[0].file
    shard = map_shard(path)
    tokens = shard.tokens.copy()
    new = write_shard(path, tokens, np.asarray(change(tokens, shard.row_offsets.copy()), np.int32))
    train = type(info.train)(
        num_documents=info.train.num_documents, num_tokens=info.train.num_tokens, shards=(new, *info.train.shards[1:])
    )
    write_info(data, type(info)(**{**vars(info), "train": train}))


def put_large_id(tokens, offsets):
    tokens[5] = 60_000
    return offsets


def join_rows(tokens, offsets):
    return np.delete(offsets, 3)


def cut_row(tokens, offsets):
    return np.insert(offsets, 3, offsets[3] - 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put_large_id, "holds the token id 60000, and the vocabulary ends at"),
        (join_rows, "documents, dataset.json says"),
        (cut_row, "1 documents have no end"),
    ],
)
def test_content_that_cannot_be_right_is_told_whatever_the_checksums_say(data, capsys, change, told):
    rewrite(data, change)
    code, found = ask(capsys, "verify", data)
    assert code == 1 and any(told in line for line in found["sources"][0]["damage"])


def test_every_damaged_file_is_told(data, capsys):
    first, second, *_ = read_info(data).train.shards
    damage_byte(data / first.file)
    (data / second.file).unlink()
    (data / "tokenizer.json").write_text("{}")
    code, found = ask(capsys, "verify", data)
    assert code == 1
    for told in (f"{first.file} is corrupt", f"{second.file} is missing", "tokenizer.json is not the file"):
        assert sum(told in line for line in found["sources"][0]["damage"]) == 1


def test_what_is_no_data_is_named(tmp_path, capsys):
    assert main(["data", "ls", str(tmp_path / "none")]) == 2
    assert f"TARGET={tmp_path / 'none'} is no prepared folder" in capsys.readouterr().err
