"""Chat templates in the manner of known models, written for the tests, and a tokenizer that knows their tokens."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

SPECIAL = [
    *("<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
]
TEXT = (
    "You are helpful. What is the capital of France? Paris. And of Italy? Rome, I think. user assistant system\n\n" * 3
)

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN25 = """\
{%- if messages[0].role != "system" %}{{ "<|im_start|>system\\nYou are Q.<|im_end|>\\n" }}{% endif %}
{%- if tools %}{{ "<|im_start|>tools\\n" }}
    {%- for t in tools %}{{ t | tojson }}{% endfor %}{{ "<|im_end|>\\n" }}
{%- endif %}
{%- for m in messages %}
    {%- set role = "user" if m.role == "tool" else m.role %}
    {{- "<|im_start|>" + role + "\\n" }}
    {%- if m.role == "tool" %}{{ "<tool_response>\\n" + m.content + "\\n</tool_response>" }}
    {%- else %}{{ m.content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- "<tool_call>\\n" + (call.function | tojson) + "\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

# thoughts stay only behind the last question; the last answer there always has some, if empty
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set said = m.content %}{% set thought = m.reasoning_content or "" %}
    {%- if "</think>" in said %}
        {%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
        {%- set said = said.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "<|im_start|>" + m.role + "\\n" }}
    {%- if m.role == "assistant" and loop.index0 > ns.last and (loop.last or thought) %}
        {{- "<think>\\n" + thought + "\\n</think>\\n\\n" }}
    {%- endif %}
    {{- said + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == "system" %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = "" %}{% set rest = messages %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nKnows until 2023\\n\\n" + system + "<|eot_id|>" }}
{%- for m in rest %}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

SMOLLM3 = """\
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}{% generation %}{{ m.content | trim + "<|im_end|>" }}{% endgeneration %}
        {{- "\\n" }}
    {%- else %}{{ "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

# the system prompt stands in the first question; who speaks twice in a row is refused
MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == "system" %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = "" %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("Roles must alternate") }}{% endif %}
    {%- if m.role == "user" %}
        {{- "[INST] " + (system + "\\n\\n" if loop.first and system else "") + m.content + "[/INST]" }}
    {%- else %}{{ " " + m.content + eos_token }}{% endif %}
{%- endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "smollm3": SMOLLM3,
    "mistral": MISTRAL,
}
TOKENS = {
    **{name: {"bos_token": "", "eos_token": "<|im_end|>"} for name in TEMPLATES},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}


def build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
