"""Files of other people: what they are, which of them are data, and rows that have no text."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.preparation.documents import find_sources
from elastic.data.preparation.first_bytes import find_codec, find_encoding
from elastic.data.preparation.prepare import prepare
from elastic.data.preparation.rows import NoText
from elastic.errors import DataError

TEXTS = ["A first text, caf\u00e9 and \u4e16.\n", "A second one.\n", "The third.\n"]


def read(path, text_key="text"):
    (source,) = find_sources([path], text_key=text_key)
    return list(source.read())


def find(*inputs):
    """Return the names taken, and what was told."""
    notes = []
    return [
        source.name.rpartition("/")[2] for source in find_sources(inputs, text_key="text", on_note=notes.append)
    ], notes


def to_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def compress_zst(data):
    return pa.compress(data, codec="zstd", asbytes=True)


# ---- rows without text


def write_rows(path, texts):
    rows = [{"text": text, "id": 1} for text in texts]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema({"text": pa.string(), "id": pa.int64()})), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_one_null_among_many_rows_is_left_out_counted_and_told_whatever_the_reader(tmp_path, ending):
    path = write_rows(tmp_path / f"a.{ending}", ["some text"] * 150 + [None] + ["more text"] * 149)
    notes = []
    info = prepare([path], tmp_path / "out", vocab_size=300, val_fraction=0, on_note=notes.append)
    assert info.train.num_documents == 299
    (note,) = [note for note in notes if note.startswith("left out")]
    assert "left out 1 of 300 rows, which have no text; the first: " in note
    assert f"a.{ending}" in note and "151" in note


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_more_than_a_share_of_rows_without_text_ends_the_job_at_the_first_of_them(tmp_path, ending):
    path = write_rows(tmp_path / f"a.{ending}", ["some text"] * 80 + [None] * 20)
    with pytest.raises(DataError, match=rf"a\.{ending}.*81 .*as 20 of 100 rows.*0\.1.*--text-key.*--max-missing"):
        prepare([path], tmp_path / "out", vocab_size=300, val_fraction=0)
    info = prepare([path], tmp_path / "out", vocab_size=300, val_fraction=0, max_missing=0.2)
    assert info.train.num_documents == 80


def test_a_wrong_key_ends_the_job_after_a_thousand_rows_and_not_at_the_end_of_a_large_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3000 + "this is never read")
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 has no text under the key 'text'; it has: body, as 1,000 of 1,000"
    ):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300)


def test_rows_without_text_all_over_many_files_end_the_job_as_well(tmp_path):
    for i in range(9):
        write_rows(tmp_path / f"{i}.jsonl", ["text", None])  # one row of each file may be without
    with pytest.raises(DataError, match=r"0\.jsonl:2 has null under the key 'text', and no text, as 9 of 18 rows"):
        prepare([tmp_path / "*.jsonl"], tmp_path / "out", vocab_size=300, val_fraction=0)


@pytest.mark.parametrize("value", [None, 5, ["text"], {"text": "x"}])
def test_a_value_that_is_no_text_is_a_row_without_text(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n" + to_lines(["text"]))
    missing, text = read(tmp_path / "a.jsonl")
    assert isinstance(missing, NoText) and missing.where.endswith("a.jsonl:1") and text == "text"


# ---- first bytes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "json"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path, encoding, ending):
    content = TEXTS[0] if ending == "txt" else to_lines(TEXTS)
    (tmp_path / f"a.{ending}").write_bytes(content.encode(encoding))
    assert read(tmp_path / f"a.{ending}") == (TEXTS[:1] if ending == "txt" else TEXTS)


@pytest.mark.parametrize("encoding", ["utf-16le", "utf-16be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf_16_without_a_mark_is_refused_with_advice_that_makes_it_readable(tmp_path, encoding, name):
    content = to_lines(["plain text"] * 3)
    (tmp_path / name).write_bytes(content.encode(encoding))
    with pytest.raises(DataError, match=f"holds NUL bytes.*iconv -f {encoding} -t utf-8"):
        read(tmp_path / name)


def test_nul_bytes_far_into_a_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some lines of text\n" * 5000 + b"and \0 then\n")
    with pytest.raises(DataError, match="holds NUL bytes, so it is not text"):
        read(tmp_path / "a.txt")


def make_tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return data.getvalue()


def make_zip():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a", "text")
    return data.getvalue()


def make_parquet():
    data = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), data)
    return data.getvalue()


NO_TEXT = {  # by name: what a compressor makes holds the time, and a test's id must not
    "pdf": (lambda: b"%PDF-1.7\n1 0 obj", "is a PDF, not text.*pdftotext"),
    "zip": (make_zip, "is a zip archive"),
    "tar": (make_tar, "is a tar archive.*tar xf"),
    "parquet": (make_parquet, r"is a Parquet file.*\.parquet"),
    "xz": (lambda: b"\xfd7zXZ\x00 and more", "is an xz archive.*xz -d"),
    "gzip twice": (lambda: gzip.compress(gzip.compress(b"text")), "is compressed"),
    "tar.gz": (lambda: gzip.compress(make_tar()), "is a tar archive"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_what_is_no_text_is_refused_as_what_it_is(tmp_path, name, kind):
    make, message = NO_TEXT[kind]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "latin1" not in str(caught.value)


def test_a_parquet_file_that_is_none_is_refused_as_what_it_is(tmp_path):
    (tmp_path / "a.parquet").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as its name says: it is compressed \(gzip\)"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, compress_zst])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst"])
def test_what_is_compressed_is_read_whatever_its_name_says(tmp_path, compress, name):
    (tmp_path / name).write_bytes(compress(to_lines(TEXTS).encode()))
    assert read(tmp_path / name) == TEXTS


@given(st.binary(max_size=64))
def test_the_first_bytes_of_anything_are_judged_and_never_end_in_another_error(head):
    find_codec(head)
    try:
        encoding = find_encoding(head, "a.txt")
    except DataError:
        return
    assert encoding.startswith("utf-")
    assert encoding != "utf-8" or b"\0" not in head


# ---- JSON under its usual name


@pytest.mark.parametrize(
    "content",
    [
        to_lines(TEXTS),
        "\n" + to_lines(TEXTS).replace("\n", "\n\n"),
        json.dumps([{"text": text} for text in TEXTS]),
        json.dumps([{"text": text} for text in TEXTS], indent=2) + "\n",
        "".join(json.dumps({"text": text}, indent=2) for text in TEXTS),
        to_lines(TEXTS).rstrip("\n"),
    ],
    ids=["lines", "blank lines", "array", "pretty array", "pretty objects", "no last newline"],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, compress_zst])
def test_json_is_read_however_it_is_laid_out(tmp_path, content, compress):
    ending = {gzip.compress: ".gz", compress_zst: ".zst"}.get(compress, "")
    (tmp_path / f"a.json{ending}").write_bytes(compress(content.encode()))
    assert read(tmp_path / f"a.json{ending}") == TEXTS


def test_a_json_array_larger_than_a_piece_comes_back_whole(tmp_path):
    texts = [f"{i} " + "x" * 3000 for i in range(1500)]  # 4.5 MB, read in pieces of 1 MiB
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert read(tmp_path / "a.json") == texts


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": ', '[{"text": "a"} x]', '{"text": "a"', "nonsense"])
def test_json_that_is_cut_short_or_none_is_refused_with_its_place(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json is not JSON: item [12]"):
        read(tmp_path / "a.json")


# ---- folders


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".parquet"):
            pq.write_table(pa.table({"text": TEXTS}), path)
        else:
            content = to_lines(TEXTS).encode()
            path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)


def test_what_stands_beside_data_in_a_folder_is_left_out_and_named(tmp_path):
    fill(
        tmp_path,
        *("data/a.parquet", "data/b.parquet", "README.md", "LICENSE.txt", "requirements.txt", "dataset_infos.json"),
        *("._README.md", ".DS_Store", "data/._a.parquet", ".cache/c.txt", "_SUCCESS.txt", "thesis.docx"),
    )
    (tmp_path / "data" / "._a.parquet").write_bytes(b"\0\5\x16\7")
    names, notes = find(tmp_path)
    assert names == ["a.parquet", "b.parquet"]
    told = "\n".join(notes)
    assert "took 2 files (2 .parquet)" in told
    assert "left out, about the data: LICENSE.txt, README.md, dataset_infos.json, requirements.txt" in told
    assert "left out, hidden: .DS_Store, ._README.md, .cache/c.txt, _SUCCESS.txt, data/._a.parquet" in told
    assert "left out, of a kind that is not read: thesis.docx" in told


def test_endings_are_read_in_any_case_and_all_that_a_glob_names_is_taken_or_told(tmp_path):
    fill(tmp_path, "part-0.jsonl", "part-1.json", "part-2.JSONL.gz", "part-3.Parquet", "part-4.json.GZ", "part-5.csv")
    names, notes = find(f"{tmp_path}/part-*")
    assert names == ["part-0.jsonl", "part-1.json", "part-2.JSONL.gz", "part-3.Parquet", "part-4.json.GZ"]
    assert any("not read: part-5.csv" in note for note in notes)
    info = prepare([f"{tmp_path}/part-*"], tmp_path / "out", vocab_size=300, val_fraction=0)
    assert info.train.num_documents == 5 * len(TEXTS)


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path):
    fill(tmp_path, "README.md", "_a.jsonl")
    assert find(tmp_path / "README.md", tmp_path / "_a.jsonl")[0] == ["README.md", "_a.jsonl"]


def test_a_folder_of_nothing_but_words_about_data_is_refused(tmp_path):
    fill(tmp_path, "README.md", ".hidden.jsonl")
    with pytest.raises(DataError, match=r"holds no data.*Name a file itself"):
        find(tmp_path)


def test_a_hidden_folder_that_is_named_is_searched(tmp_path):
    fill(tmp_path, ".cache/_corpus/a.jsonl")
    assert find(tmp_path / ".cache" / "_corpus")[0] == ["a.jsonl"]
    assert find(f"{tmp_path}/.cache/_corpus/*.jsonl")[0] == ["a.jsonl"]


# ---- parquet


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())),
        *(pa.dictionary(pa.int32(), pa.large_string()), pa.binary(), pa.large_binary(), pa.binary_view()),
    ],
    ids=str,
)
def test_text_in_parquet_is_read_however_arrow_keeps_it(tmp_path, kind):
    data = [text.encode() if "binary" in str(kind) else text for text in TEXTS]
    array = pa.array(data).dictionary_encode() if isinstance(kind, pa.DictionaryType) else pa.array(data, kind)
    pq.write_table(pa.table({"text": array.cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS


def test_bytes_in_parquet_that_are_no_text_are_told_with_their_row(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"good", b"\xff\xd8\xff"])}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == "good" and bad.kind == "are not UTF-8"
    assert bad.where.endswith("a.parquet row 2") and "bytes in the column 'text' that are not UTF-8" in bad.why
