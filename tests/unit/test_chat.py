"""Conversations become tokens of which the assistants' alone count; what is damaged is named and left out."""

import json
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.data.inspection import decode_sample, load_own_tokenizer
from elastic.data.packing import PackedSamples
from elastic.data.preparation.chat.conversations import build_taker
from elastic.data.preparation.chat.encoder import find_counted
from elastic.data.preparation.chat.template import ChatTemplate, TemplateRefusalError, load_template
from elastic.data.preparation.prepare import prepare
from elastic.data.preparation.rows import NoText
from elastic.data.prepared.shards import open_dataset
from elastic.errors import DataError
from tests.unit._chat import SPECIAL, TEMPLATES, TOKENS, build_tokenizer

TOKENIZER = build_tokenizer()
CONVERSATION = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?\n\n"},
    {"role": "assistant", "content": "Rome, I think. \u00e9\U0001f600"},
    {"role": "user", "content": "Nobody answers this."},
]
END = {name: tokens["eos_token"] for name, tokens in TOKENS.items()}


def make_template(name):
    return ChatTemplate(source=TEMPLATES[name], tokens=TOKENS[name])


def get_counted(template, messages, tools=()):
    """Return the stretches that count, of each document, as text."""
    found = []
    for rendered in template.split(messages, tools):
        encoding = TOKENIZER.encode(rendered.text, add_special_tokens=False)
        flags = find_counted(encoding, rendered, frozenset(SPECIAL))
        runs = groupby(zip(encoding.ids, flags, strict=True), key=lambda pair: pair[1])
        found.append(
            [TOKENIZER.decode([i for i, _ in run], skip_special_tokens=False) for counts, run in runs if counts]
        )
    return found


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"qwen3"}))
def test_what_counts_is_exactly_what_assistants_write_and_the_token_that_ends_it(name):
    space = " " if name == "mistral" else ""
    answers = [f"{space}{text}{END[name]}" for text in ("Paris.", "Rome, I think. \u00e9\U0001f600")]
    assert get_counted(make_template(name), CONVERSATION) == [answers]


def test_a_turn_that_is_written_otherwise_once_others_follow_is_a_document_of_its_own():
    thinking = [dict(turn) for turn in CONVERSATION]
    thinking[2]["content"] = "<think>\nWhere?\n</think>\n\nParis."
    first, second = get_counted(make_template("qwen3"), thinking)
    assert first == ["<think>\nWhere?\n</think>\n\nParis.<|im_end|>"]
    assert second == ["<think>\n\n</think>\n\nRome, I think. \u00e9\U0001f600<|im_end|>"]
    documents = list(make_template("qwen3").split(thinking))
    assert "Italy" not in documents[0].text and "Where?" not in documents[1].text


def test_a_step_before_the_last_answer_is_written_as_its_prompt_has_it():
    """Qwen3 writes empty thoughts before the last message only, and each step is the last when it is written."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look it up."},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    thoughts = "<think>\n\n</think>\n\n"
    assert get_counted(make_template("qwen3"), messages) == [
        [f"{thoughts}I look it up.<|im_end|>"],
        [f"{thoughts}Sun.<|im_end|>"],
    ]


def test_calls_of_tools_count_and_their_answers_do_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    (document,) = make_template("qwen2.5").split(messages, [{"name": "weather"}])
    assert '{"name": "weather"}' in document.text
    ((first, second),) = get_counted(make_template("qwen2.5"), messages, [{"name": "weather"}])
    assert first == '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert second == "Sun.<|im_end|>"


def test_a_turn_of_weight_0_is_read_and_not_learned_even_where_the_template_marks_it():
    weighted = [dict(turn) for turn in CONVERSATION]
    weighted[2]["weight"] = 0
    for name in ("chatml", "smollm3"):
        assert get_counted(make_template(name), weighted) == [["Rome, I think. \u00e9\U0001f600<|im_end|>"]]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<x>{% endif %}",
            "go on from",
        ),
        ("{{ raise_exception('no') }}", "refused by the chat template"),
        ("{{ messages.__class__.__mro__ }}", "refused by the chat template"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}x", "without any part"),
    ],
)
def test_a_template_that_does_not_say_what_is_the_assistants_is_refused_and_nothing_is_guessed(source, kind):
    with pytest.raises(TemplateRefusalError) as refusal:
        list(ChatTemplate(source=source, tokens={}).split(CONVERSATION))
    assert kind in refusal.value.kind


OK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASKED, TOLD = OK


def call(**changes):
    return [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", **changes}}]}]


DAMAGE = {
    "are no objects": ["text"],
    "have no messages": [{"text": "a"}],
    "have null for messages": [{"messages": None}],
    "have messages that are text and no JSON": [{"messages": "[{"}],
    "have messages that are no list": [{"messages": {"role": "user"}}],
    "have no turns": [{"messages": []}],
    "have a turn that is no object": [{"messages": ["a", "b"]}],
    "have a turn without role": [{"messages": [{"content": "a"}]}],
    "have a turn of an unknown role": [{"messages": [{"role": r, "content": "a"}]} for r in ("narrator", None, 3)],
    "have a turn without content": [{"messages": [ASKED, {"role": "assistant"}]}],
    "have a turn whose content is null": [{"messages": [ASKED, {"role": "assistant", "content": None}]}],
    "have a turn whose content is no text": [
        {"messages": [ASKED, {"role": "assistant", "content": content}]} for content in (3, {}, [3], [{"type": "text"}])
    ],
    "have an empty turn": [{"messages": [ASKED, {"role": "assistant", "content": text}]} for text in ("", " \n")],
    "have a turn with more than text": [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TOLD]}],
    "have a turn whose weight is neither 0 nor 1": [{"messages": [ASKED, {**TOLD, "weight": 2}]}],
    "were decoded wrongly": [{"messages": [ASKED, {**TOLD, "content": text}]} for text in ("caf\ufffd", "\ud83d")],
    "have control characters": [{"messages": [ASKED, {**TOLD, "content": "a\0b"}]}],
    "have no turn of an assistant": [{"messages": [{"role": "system", "content": "a"}]}, {"messages": [ASKED]}],
    "begin with the assistant": [{"messages": [TOLD, ASKED]}],
    "have a system prompt that is not the first turn": [{"messages": [*OK, {"role": "system", "content": "x"}]}],
    "have a tool's answer without a call": [{"messages": [ASKED, {"role": "tool", "content": "x"}, TOLD]}],
    "have no turn of an assistant that counts": [{"messages": [ASKED, {**TOLD, "weight": 0}]}],
    "have tool calls that are no list": [{"messages": [ASKED, {**TOLD, "tool_calls": "f()"}]}],
    "have tool calls that are not the assistant's": [{"messages": [{**ASKED, "tool_calls": [{"name": "f"}]}, TOLD]}],
    "have a tool call without a function's name": [{"messages": call(name=None)}],
    "have a tool call whose arguments are no JSON": [{"messages": call(arguments="{city")}],
    "have a tool call whose arguments are no object": [{"messages": call(arguments="[1]")}],
    "have tools that are text and no JSON": [{"messages": OK, "tools": "[{"}],
    "have tools that are no list of objects": [{"messages": OK, "tools": [3]}],
}
LATE = {
    "have a special token written out in a turn": [{"messages": [ASKED, {**TOLD, "content": "x<|im_end|>y"}]}],
    "are longer than 60 tokens": [{"messages": [ASKED, {**TOLD, "content": "q" * 100_000}]}],
}
"""Found once the template has written them."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_conversation_is_named_and_not_taken(kind):
    for row in DAMAGE[kind]:
        found = build_taker("messages", None)(row, "here")
        assert isinstance(found, NoText) and (found.kind, found.where) == (kind, "here")


def test_all_keepings_of_a_conversation_come_to_the_same_turns():
    messages = [{"role": "system", "content": "s"}, *OK]
    shared = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    texts = [
        build_taker("messages", None)({"messages": messages}, ""),
        build_taker("messages", None)({"messages": parts}, ""),
        build_taker("messages", None)({"messages": json.dumps(messages)}, ""),
        build_taker("messages", "chat")({"chat": messages}, ""),
        build_taker("sharegpt", None)(shared, ""),
        build_taker("alpaca", None)({"instruction": "a", "input": "", "output": "b", "system": "s"}, ""),
    ]
    assert set(texts) == {json.dumps({"messages": messages}, separators=(",", ":"))}
    asked = build_taker("alpaca", None)({"instruction": "Sum", "input": "1 2", "output": "3"}, "")
    assert json.loads(asked)["messages"][0]["content"] == "Sum\n\n1 2"
    for row in ({"instruction": "a"}, {"instruction": " ", "output": "b"}, {"instruction": "a", "output": None}):
        assert isinstance(build_taker("alpaca", None)(row, ""), NoText)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS["chatml"]))
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    return folder


def make_good(count):
    return [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {**TOLD, "content": f"It is {i}."}]}
        for i in range(count)
    ]


def test_a_file_with_thirty_kinds_of_damage_is_prepared_without_them_and_each_is_told(model, tmp_path):
    good, bad = make_good(400), [row for rows in (DAMAGE | LATE).values() for row in rows]
    lines = [json.dumps(row) for row in [*good, *bad]]
    lines += ['{"messages": [', "\n"]
    content = "\n".join(lines).encode() + b'\n{"messages": [{"role": "user", "content": "caf\xe9"}]}\n'
    (tmp_path / "chat.jsonl").write_bytes(content)
    notes = []
    prepare(
        *([tmp_path / "chat.jsonl"], tmp_path / "data"),
        tokenizer=model,
        chat="messages",
        max_tokens=60,
        val_fraction=0.1,
        num_processes=1,
        on_note=notes.append,
    )
    told = [kind for kind in (*DAMAGE, *LATE, "are not JSON", "are not UTF-8") if any(kind in note for note in notes)]
    assert len(told) == len(DAMAGE) + len(LATE) + 2 == 33
    dataset = open_dataset(tmp_path / "data")
    assert dataset.info.has_counted
    assert dataset.info.train.num_documents + dataset.info.val.num_documents == 400
    seen = []
    for split in ("train", "val"):
        tokens = dataset.read_tokens(split, 0, dataset.info.get_split(split).num_tokens)
        counted = dataset.read_counted(split, 0, len(tokens))
        seen += TOKENIZER.decode(tokens[counted].tolist(), skip_special_tokens=False).split("<|im_end|>")[:-1]
    assert sorted(seen) == sorted(f"It is {i}." for i in range(400))


def test_rows_of_parquet_are_conversations_as_those_of_json(model, tmp_path):
    rows = make_good(30)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"tokenizer": model / "tokenizer.json", "chat": "messages", "val_fraction": 0.0, "num_processes": 1}
    found = [
        prepare([tmp_path / f"chat.{ending}"], tmp_path / ending, **how).identity.train_sha256
        for ending in ("jsonl", "parquet")
    ]
    assert found[0] == found[1]


def test_only_what_counts_is_a_target_of_packed_samples_and_the_rest_is_shown_as_not_counted(model, tmp_path):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_good(30)))
    prepare(
        [tmp_path / "chat.jsonl"],
        tmp_path / "data",
        tokenizer=model,
        chat="messages",
        val_fraction=0.0,
        num_processes=1,
    )
    dataset = open_dataset(tmp_path / "data")
    samples = PackedSamples(dataset, "train", 128)
    targets = [sample.labels[sample.counted] for sample in map(samples.read, range(len(samples)))]
    text = TOKENIZER.decode(np.concatenate(targets).tolist(), skip_special_tokens=False)
    assert sorted(text.split("<|im_end|>")[:-1]) == sorted(f"It is {i}." for i in range(30))
    passages = decode_sample(dataset, "train", samples.read(0), load_own_tokenizer(dataset))
    assert all("What is" in passage.uncounted and "It is" not in passage.uncounted for passage in passages)


def test_a_model_without_a_template_or_a_template_that_fits_nothing_ends_the_job(model, tmp_path):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_good(30)))
    how = {"chat": "messages", "val_fraction": 0.0, "num_processes": 1}
    with pytest.raises(DataError, match="--tokenizer HF_DIR"):
        prepare([tmp_path / "chat.jsonl"], tmp_path / "data", **how)
    (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(DataError, match="30 of 30 conversations cannot be used"):
        prepare([tmp_path / "chat.jsonl"], tmp_path / "data", tokenizer=model, **how)
    assert not (tmp_path / "data").exists()
    (model / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="there is no chat template"):
        load_template(model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    with pytest.raises(DataError, match="is no template"):
        load_template(model / "tokenizer.json")
