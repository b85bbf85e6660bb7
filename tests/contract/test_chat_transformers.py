"""Our texts, tokens and masks of conversations beside those of transformers, which runs the same templates."""

import pytest
from transformers import PreTrainedTokenizerFast

from elastic.data.preparation.chat.encoder import find_counted
from elastic.data.preparation.chat.template import ChatTemplate
from tests.unit._chat import SPECIAL, TEMPLATES, TOKENS, build_tokenizer
from tests.unit.test_chat import CONVERSATION

ANSWERED = CONVERSATION[:-1]


def make_both(name):
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), **{k: v for k, v in TOKENS[name].items() if v})
    theirs.chat_template = TEMPLATES[name]
    return theirs, ChatTemplate(source=TEMPLATES[name], tokens=TOKENS[name])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompts", [False, True])
def test_a_template_writes_what_it_writes_in_transformers(name, prompts):
    theirs, ours = make_both(name)
    messages = ANSWERED[:-1] if prompts else ANSWERED
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
    assert ours.render(messages, prompts=prompts) == expected


def test_where_a_template_marks_the_assistants_part_tokens_and_mask_are_those_of_transformers():
    theirs, ours = make_both("smollm3")
    expected = theirs.apply_chat_template(ANSWERED, return_dict=True, return_assistant_tokens_mask=True)
    (rendered,) = ours.split(ANSWERED)
    encoding = build_tokenizer().encode(rendered.text, add_special_tokens=False)
    assert encoding.ids == expected["input_ids"]
    assert list(map(int, find_counted(encoding, rendered, frozenset(SPECIAL)))) == expected["assistant_masks"]
    assert sum(expected["assistant_masks"]) > 5


def test_differences_find_what_marks_say():
    """The same template with its marks taken out."""
    source = TEMPLATES["smollm3"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    found = []
    for template in (ChatTemplate(source=source, tokens={}), make_both("smollm3")[1]):
        (rendered,) = template.split(ANSWERED)
        encoding = build_tokenizer().encode(rendered.text, add_special_tokens=False)
        found.append(find_counted(encoding, rendered, frozenset(SPECIAL)))
    assert found[0] == found[1]
