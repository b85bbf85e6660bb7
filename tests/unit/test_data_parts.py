"""One set prepared in parts, documents that are there twice, rows that are broken, and texts deep inside rows."""

import json
import random

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli import main
from elastic.data.inspection import find_damage
from elastic.data.preparation.documents import Source, find_sources
from elastic.data.preparation.parts import Part, choose_sources, join_parts
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.format import read_info
from elastic.data.prepared.shards import open_dataset
from elastic.errors import DataError

TEXTS = [f"Document {n} speaks of {n * n} sheep, and of nothing else." for n in range(120)]


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path, key):
    (source,) = find_sources([path], text_key=key)
    return list(source.read())


@pytest.fixture
def inputs(tmp_path):
    """Seven files of different sizes, and a tokenizer."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(7):
        write_lines(folder / f"{n}.jsonl", [{"text": text} for text in TEXTS[n * n * 2 : (n + 1) ** 2 * 2 + 3]])
    prepare([folder], tmp_path / "whole", vocab_size=300, val_fraction=0.2)
    return folder


def decode(folder):
    """Return the documents of each split, as tuples of tokens; a shard may end within one."""
    found = {}
    for split in ("train", "val"):
        found[split], document = [], []
        for shard in read_info(folder).get_split(split).shards:
            for row in pa.ipc.open_file(folder / shard.file).read_all()["tokens"].to_pylist():
                document += row
                if row[-1] == 0:  # the end-of-text token of our own tokenizer
                    found[split].append(tuple(document))
                    document = []
    return found


# ---- parts


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), data=st.data())
def test_parts_are_the_whole_and_about_equal(sizes, data):
    of = data.draw(st.integers(1, len(sizes)))
    sources = [Source(f"f{n}", size, list) for n, size in enumerate(sizes)]
    parts = [choose_sources(sources, Part(number, of)) for number in range(1, of + 1)]
    assert sorted(source.name for part in parts for source in part) == sorted(source.name for source in sources)
    assert all(parts)
    weights = [sum(source.size_bytes for source in part) for part in parts]
    assert max(weights) <= sum(sizes) / of + max(sizes)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_joined_are_what_one_machine_would_have_made(inputs, tmp_path, order):
    notes = []
    for number in order:
        made = prepare(
            [inputs],
            tmp_path / "out",
            tokenizer=tmp_path / "whole" / "tokenizer.json",
            val_fraction=0.2,
            shard_tokens=300,
            part=f"{number}/3",
            on_note=notes.append,
        )
    whole, joined = read_info(tmp_path / "whole"), read_info(tmp_path / "out")
    assert joined == made
    for split in ("train", "val"):
        assert sorted(decode(tmp_path / "out")[split]) == sorted(decode(tmp_path / "whole")[split])
        assert joined.get_split(split).num_tokens == whole.get_split(split).num_tokens
        assert joined.get_split(split).num_documents == whole.get_split(split).num_documents
    assert joined.train_entropy_nats == pytest.approx(whole.train_entropy_nats)
    assert joined.val_cross_entropy_nats == pytest.approx(whole.val_cross_entropy_nats)
    assert joined.largest_id == whole.largest_id
    assert list(find_damage(open_dataset(tmp_path / "out", verify="all"))) == []
    told = [note for note in notes if note.startswith(("part ", "all "))]
    assert told[0].endswith(f"missing: {', '.join(str(n) for n in (1, 2, 3) if n != order[0])} of 3")
    assert told[-1] == f"all 3 parts are joined in {tmp_path / 'out'}"
    assert not list((tmp_path / "out").glob("part-*"))


def test_the_checksums_of_joined_blocks_are_those_of_the_shards(inputs, tmp_path):
    from elastic.data.prepared.format import BLOCK_SUMS_FILE, write_block_sums

    for number in (2, 1):
        tokenizer = tmp_path / "whole" / "tokenizer.json"
        prepare([inputs], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2, shard_tokens=300, part=f"{number}/2")
    found = (tmp_path / "out" / BLOCK_SUMS_FILE).read_bytes()
    write_block_sums(tmp_path / "out", read_info(tmp_path / "out"))
    assert found == (tmp_path / "out" / BLOCK_SUMS_FILE).read_bytes()


def test_a_join_that_was_cut_short_is_done_by_the_next_call(inputs, tmp_path, monkeypatch):
    def part(number):
        return prepare([inputs], tmp_path / "out", tokenizer=tmp_path / "whole" / "tokenizer.json", part=f"{number}/2")

    part(1)
    with monkeypatch.context() as patched:
        patched.setattr("elastic.data.preparation.parts.write_info", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            part(2)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert part(1) == read_info(tmp_path / "out")
    assert list(find_damage(open_dataset(tmp_path / "out"))) == []
    assert join_parts(tmp_path / "out", 2) == read_info(tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "told"),
    [("0/3", "not one of several parts"), ("4/3", "not one"), ("half", "not one"), ("1/8", "Use at most 7 parts")],
)
def test_a_part_that_cannot_be_is_refused(inputs, tmp_path, part, told):
    with pytest.raises(DataError, match=told):
        prepare([inputs], tmp_path / "out", tokenizer=tmp_path / "whole" / "tokenizer.json", part=part)
    with pytest.raises(DataError, match="needs --tokenizer"):
        prepare([inputs], tmp_path / "out", part="1/3")


# ---- documents that are there twice


def test_of_equal_documents_the_first_is_taken_on_request(tmp_path):
    texts = [*TEXTS, *TEXTS[:30], TEXTS[0]]
    random.Random(1).shuffle(texts)
    source, notes = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), []
    kept = prepare([source], tmp_path / "kept", vocab_size=300, val_fraction=0)
    assert kept.train.num_documents == 151
    options = {"tokenizer": tmp_path / "kept" / "tokenizer.json", "duplicates": "drop", "on_note": notes.append}
    dropped = prepare([source], tmp_path / "dropped", val_fraction=0, **options)
    assert dropped.train.num_documents == 120
    assert decode(tmp_path / "dropped")["train"] == list(dict.fromkeys(decode(tmp_path / "kept")["train"]))
    assert "left out 31 of 151 documents, which are equal to an earlier one" in notes


# ---- broken rows


def test_broken_rows_are_counted_by_kind_and_the_first_of_each_is_told(tmp_path):
    rows = [json.dumps({"text": text}).encode() for text in TEXTS]
    rows[7], rows[30] = b'{"text": "cut sho', b"nonsense"
    rows[50] = '{"text": "caf\xe9"}'.encode("latin1")
    rows[60] = b'{"text": null}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    notes = []
    info = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300, val_fraction=0, on_note=notes.append)
    assert info.train.num_documents == 116
    told = {note.partition("; the first: ")[0]: note.partition("; the first: ")[2] for note in notes if "rows" in note}
    path = tmp_path / "a.jsonl"
    assert told["left out 2 of 120 rows, which are not JSON"].startswith(f"{path}:8 is not JSON (")
    assert told["left out 1 of 120 rows, which are not UTF-8"].startswith(f"{path}:51 is not UTF-8 (byte 0xe9; ")
    assert told["left out 1 of 120 rows, which have no text"].startswith(f"{path}:61 has null")


def test_more_than_a_share_of_broken_rows_ends_the_job(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*({"text": text} for text in TEXTS), *["{broken"] * 30])
    with pytest.raises(
        DataError, match=r"a\.jsonl:121 is not JSON .* as 30 of 150 rows so far: more than a share of 0\.1"
    ):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


# ---- texts deep inside rows

CHATS = [{"messages": [{"role": "user", "content": text}, {"role": "bot", "content": "Yes."}]} for text in TEXTS[:9]]


@pytest.mark.parametrize(
    ("key", "rows", "texts"),
    [
        ("messages.0.content", CHATS, TEXTS[:9]),
        ("messages.-1.content", CHATS, ["Yes."] * 9),
        ("a.b", [{"a.b": "flat"}, {"a": {"b": "deep"}}], ["flat", "deep"]),
    ],
)
def test_a_key_with_dots_leads_inside(tmp_path, key, rows, texts):
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert read(tmp_path / "a.jsonl", key) == read(tmp_path / "b.json", key) == texts


def test_a_key_that_leads_nowhere_is_a_row_without_text(tmp_path):
    write_lines(
        tmp_path / "a.jsonl", [{"messages": []}, {"messages": [{"content": 5}]}, {"messages": [{"content": "x"}]}]
    )
    nowhere, number, text = read(tmp_path / "a.jsonl", "messages.0.content")
    assert "has no text under the key 'messages.0.content'; it has: messages" in nowhere.why
    assert "has int under the key" in number.why and text == "x"


def test_texts_inside_the_columns_of_parquet_are_found(tmp_path):
    pq.write_table(pa.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "messages.0.content") == TEXTS[:9]
    with pytest.raises(DataError, match=r"no text column 'chat\.0'; it has: messages \(list"):
        read(tmp_path / "a.parquet", "chat.0")


# ---- what Hugging Face's datasets leaves on a disk


def save_to_disk(folder, texts, *, indices=None):
    """Write what `Dataset.save_to_disk` writes (datasets 4: Arrow's stream format, and two JSON files)."""
    folder.mkdir(parents=True)
    table = pa.table({"text": pa.array(texts, pa.large_string()), "id": range(len(texts))})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": indices}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_datasets_is_read_as_it_lies_on_the_disk(tmp_path):
    save_to_disk(tmp_path / "set" / "train", TEXTS)
    save_to_disk(tmp_path / "set" / "test", ["A test."])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    notes = []
    taken = find_sources([tmp_path / "set" / "train"], text_key="text")
    assert [text for source in taken for text in source.read()] == TEXTS
    both = find_sources([tmp_path / "set"], text_key="text", on_note=notes.append)
    assert sum(len(list(source.read())) for source in both) == len(TEXTS) + 1
    assert any("a dataset of several splits, and all are taken" in note for note in notes)


def test_a_dataset_that_was_filtered_is_refused_since_its_file_holds_all_rows(tmp_path):
    save_to_disk(tmp_path / "set", TEXTS, indices=[{"filename": "cache-1.arrow"}])
    with pytest.raises(DataError, match=r"was filtered, sorted or shuffled.*flatten_indices"):
        prepare([tmp_path / "set"], tmp_path / "out", vocab_size=300)


def test_our_own_shards_are_no_text(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", vocab_size=300)
    with pytest.raises(DataError, match=r"no text column 'text'; it has: tokens \(list<item: uint16>\)"):
        prepare([tmp_path / "data"], tmp_path / "out", vocab_size=300)


# ---- what the verb shows


def test_the_verb_shows_how_the_first_document_begins(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"chat": [{"text": text}]} for text in TEXTS])
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "data"), "--text-key", "chat.0.text"]
    assert main([*command, "--vocab-size", "300", "--val-fraction", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sample"].startswith(TEXTS[0][:20]) and shown["train_tokens"] > 1000
