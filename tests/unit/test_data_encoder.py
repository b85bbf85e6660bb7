"""What becomes of a document with tokenizers of other people: its cuts, its first token, special tokens, its split."""

import json
import random

import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceBy
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from elastic.config import DataConfig, RunConfig
from elastic.data.corpus import open_corpus
from elastic.data.preparation.encoder import encode_long, split_text
from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.format import read_info
from elastic.data.prepared.hf_tokenizer import read_tokenizer
from elastic.data.prepared.tokenizer import get_prefix, load_tokenizer, train_tokenizer
from elastic.errors import DataError
from elastic.models.llama import Config as ModelConfig


@pytest.fixture(scope="module")
def chapters():
    return read_chapters()


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory, chapters):
    """A tokenizer as LLaMA 2 has it: BPE over the whole text, spaces as a letter, one before it, bytes where needed."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.pre_tokenizer = Metaspace()
    trained.train_from_iterator(chapters[:60], BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = Normalizers([Prepend("\u2581"), ReplaceBy(" ", "\u2581")])
    tokenizer.decoder = Sequence([Replace("\u2581", " "), ByteFallback(), Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    path = tmp_path_factory.mktemp("llama_2") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def prepare_texts(folder, texts, *, tokenizer, **options):
    """Prepare and return the rows, the notes and the description."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    notes = []
    options = {"val_fraction": 0, "on_note": notes.append, **options}
    info = prepare([folder / "a.jsonl"], folder / "out", tokenizer=tokenizer, **options)
    shards = [*info.train.shards, *info.val.shards]
    tables = [pa.ipc.open_file(str(folder / "out" / shard.file)).read_all() for shard in shards]
    return [row for table in tables for row in table["tokens"].to_pylist()], notes, info


# ---- cuts


def test_a_document_longer_than_a_window_has_the_tokens_of_the_whole_with_any_tokenizer(tmp_path, llama_2, chapters):
    text = "\n".join(chapters)[:600_000]  # three windows
    (row,), _, info = prepare_texts(tmp_path, [text], tokenizer=llama_2)
    assert row[1:-1] == load_tokenizer(llama_2).encode(text, add_special_tokens=False).ids
    assert info.train.num_tokens == len(row)


@given(seed=st.integers(0, 2**32), overlap_chars=st.sampled_from([64, 256]))
def test_windows_joined_are_the_whole(llama_2, chapters, seed, overlap_chars):
    pick = random.Random(seed)
    text = "".join(
        pick.choice(
            (chapters[pick.randrange(99)][: pick.randrange(900)], "a" * pick.randrange(400), "  \n", "\u4e16" * 9)
        )
        for _ in range(9)
    )
    for tokenizer in (load_tokenizer(llama_2), train_tokenizer(chapters[:3], vocab_size=300)):
        ids = encode_long(tokenizer, text, window_chars=600, overlap_chars=overlap_chars)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_windows_that_never_agree_are_encoded_as_one(llama_2):
    """'ababab...' pairs up from wherever it begins."""
    tokenizer, text = load_tokenizer(llama_2), "la" * 5001
    ids = encode_long(tokenizer, text, window_chars=801, overlap_chars=101)
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


# ---- the first token of a document


def test_documents_begin_as_the_tokenizer_begins_a_prompt(tmp_path, llama_2):
    rows, notes, info = prepare_texts(tmp_path, ["A text.", "Another."], tokenizer=llama_2)
    tokenizer = Tokenizer.from_file(str(llama_2))
    assert [tokenizer.id_to_token(row[0]) for row in rows] == ["<s>", "<s>"]
    assert rows[0][:-1] == tokenizer.encode("A text.").ids
    assert "each document begins with <s> and ends with </s>" in notes
    assert info.bos_id == tokenizer.token_to_id("<s>")
    exported = read_tokenizer(tmp_path / "out")
    assert exported.files["tokenizer.json"] == llama_2.read_bytes()
    assert json.loads(exported.files["tokenizer_config.json"])["bos_token"] == "<s>"
    assert exported.bos_id == info.bos_id


@pytest.mark.parametrize("is_old", [False, True])
def test_an_exported_tokenizer_adds_no_token_that_the_documents_did_not_begin_with(tmp_path, llama_2, is_old):
    rows, notes, info = prepare_texts(tmp_path, ["A text."], tokenizer=llama_2, bos_token="")
    if is_old:  # older versions added none and said nothing of it
        path = tmp_path / "out" / "dataset.json"
        content = json.loads(path.read_text())
        del content["bos_id"], content["largest_id"]
        path.write_text(json.dumps(content))
    exported = read_tokenizer(tmp_path / "out")
    tokenizer = Tokenizer.from_str(exported.files["tokenizer.json"].decode())
    assert tokenizer.encode("A text.").ids == rows[0][:-1]
    assert get_prefix(tokenizer) == []
    assert exported.bos_id is info.bos_id is None
    assert "each document ends with </s>" in notes


def test_a_first_token_can_be_named_and_is_then_that_of_exported_prompts_too(tmp_path, llama_2):
    plain = Tokenizer.from_file(str(llama_2))
    own = json.loads(plain.to_str())
    own["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    (tmp_path / "plain.json").write_text(json.dumps(own))
    rows, _, _ = prepare_texts(tmp_path, ["A text."], tokenizer=tmp_path / "plain.json", bos_token="<unk>")
    exported = Tokenizer.from_str(read_tokenizer(tmp_path / "out").files["tokenizer.json"].decode())
    assert rows[0][:-1] == exported.encode("A text.").ids
    assert exported.id_to_token(rows[0][0]) == "<unk>"
    with pytest.raises(DataError, match=r"no token <nothing> to begin a document with.*--bos-token ''"):
        prepare_texts(tmp_path, ["A"], tokenizer=llama_2, bos_token="<nothing>", overwrite=True)


# ---- special tokens in a text


def test_special_tokens_written_out_in_a_text_are_text_unless_asked_for_and_are_told_either_way(tmp_path, llama_2):
    texts = ["One <s> here.", "None.", "</s> and </s> there."]
    (_, _, last), notes, info = prepare_texts(tmp_path, texts, tokenizer=llama_2)
    assert last.count(info.eot_id) == 1
    told = "special tokens stand written out in 2 documents (</s>, <s>) and were read as text; --special-tokens parse"
    assert any(note.startswith(told) for note in notes)
    (first, _, last), notes, _ = prepare_texts(
        tmp_path, texts, tokenizer=llama_2, special_tokens="parse", overwrite=True
    )
    assert last.count(info.eot_id) == 3 and first.count(info.bos_id) == 2
    assert any("became the tokens; --special-tokens text" in note for note in notes)


# ---- ids beyond an embedding


def test_names_that_the_data_never_uses_need_no_row_in_an_embedding(tmp_path, llama_2):
    tokenizer = Tokenizer.from_file(str(llama_2))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>"])
    tokenizer.save(str(tmp_path / "more.json"))
    _, _, info = prepare_texts(tmp_path, ["A text. " * 40], tokenizer=tmp_path / "more.json")
    assert info.vocab_size == size + 2
    assert info.needed_vocab_size <= size

    def check(rows):
        data = DataConfig(path=str(tmp_path / "out"), seq_len=8)
        open_corpus(RunConfig(model=ModelConfig(vocab_size=rows), data=data)).check_fits()

    check(size)
    prepare_texts(tmp_path, ["A <fim_suffix>. " * 40], tokenizer=tmp_path / "more.json", overwrite=True)
    with pytest.raises(DataError, match=rf"holds the token id {size + 1}.*Set model\.vocab_size={size + 2} for a new"):
        check(size)
    check(size + 2)


# ---- what is held out


@pytest.mark.parametrize("num_documents", [1, 2])
def test_so_few_documents_that_none_would_be_held_out_are_divided_inside(tmp_path, chapters, num_documents):
    texts = chapters[:num_documents]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    notes = []
    info = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300, val_fraction=0.1, on_note=notes.append)
    assert info.train.num_documents == info.val.num_documents == num_documents
    share = info.val.num_tokens / (info.val.num_tokens + info.train.num_tokens)
    assert 0.05 < share < 0.2
    assert any("the end of each is held out" in note for note in notes)
    assert read_info(tmp_path / "out") == info


@given(text=st.text(min_size=1), val_fraction=st.floats(0.01, 0.99))
def test_dividing_a_document_loses_nothing_but_blanks(text, val_fraction):
    parts = list(split_text(text, val_fraction, "inside"))
    assert [split for split, _ in parts] in ([], ["train"], ["val"], ["train", "val"])
    joined = "".join(part for _, part in parts)
    assert joined.strip() == text.strip()


def test_data_without_validation_is_accepted_and_told(tmp_path, llama_2):
    _, notes, _ = prepare_texts(tmp_path, ["A text. " * 40], tokenizer=llama_2)
    assert any("nothing is held out" in note for note in notes)
    data = DataConfig(path=str(tmp_path / "out"), seq_len=8)
    open_corpus(RunConfig(model=ModelConfig(vocab_size=1000), data=data)).check_fits()
