"""A model's own chat template, run in jinja's sandbox, and where in its text the assistants speak.

A template may say so itself (`{% generation %}`, as transformers reads it). Of others it is found out by differences:
what a turn adds to the text of the turns before it, with the prompt for an answer at their end, is the assistant's. So
a model learns to write exactly what follows the prompt that it will be given.

Some templates write a turn otherwise once others follow (Qwen3 leaves out what was thought before the last question).
Then such a turn becomes a document of its own, with the turns before it to read: what the model sees when it has to
write it. A turn that does not go on from its prompt at all is no example of anything, and is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elastic.data.prepared.format import TOKENIZER_FILE
from elastic.errors import DataError

_BEGIN, _END = "\x01\x02", "\x02\x01"
"""Around what a template marks; a conversation never has them (`conversations.py` refuses control characters)."""
_CONFIG = "tokenizer_config.json"
_FILES = ("chat_template.jinja", _CONFIG)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One document: its text, and the stretches that count, in characters, ascending."""

    text: str
    spans: tuple[tuple[int, int], ...]


class TemplateRefusalError(Exception):
    """A conversation that the template cannot write; the message is a kind, as of `rows.NoText`."""

    def __init__(self, kind: str, why: str = "") -> None:
        super().__init__(kind)
        self.kind, self.why = kind, why


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Its source, and the tokens that it may name; small and picklable."""

    source: str
    tokens: Mapping[str, str]

    @property
    def is_marked(self) -> bool:
        """The template says itself what the assistants' is."""
        return "endgeneration" in self.source

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, prompts: bool = False) -> str:
        """Return the text of turns.

        Args:
            prompts: with what asks for an answer at the end.

        Raises:
            TemplateRefusalError: the template raises.
        """
        return self._render(messages, tools, prompts=prompts, marks=False)

    def split(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Iterator[Rendered]:
        """Yield the documents of a conversation; each has something that counts.

        Raises:
            TemplateRefusalError: the template cannot write it, or a turn that counts does not go on from its prompt.
        """
        last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]  # nobody answers what follows
        weights = [message.get("weight", 1) for message in messages]
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if self.is_marked and all(weights):
            text, spans = _unmark(self._render(plain, tools, prompts=False, marks=True))
            if not spans:
                raise TemplateRefusalError("are written by the template without any part of the assistant's")
            if text == self.render(plain, tools):  # else the template looks at what it has written
                yield Rendered(text=text, spans=spans)
                return
        yield from self._split_by_differences(plain, weights, tools)

    def _split_by_differences(
        self, messages: Sequence[Mapping[str, Any]], weights: Sequence[int], tools: Sequence[Any]
    ) -> Iterator[Rendered]:
        whole = self.render(messages, tools)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or not weights[number]:
                continue
            prompt = self.render(messages[:number], tools, prompts=True)
            text = self.render(messages[: number + 1], tools)
            if not text.startswith(prompt) or len(text) == len(prompt):
                raise TemplateRefusalError(
                    "have a turn that does not go on from its prompt", f"turn {number + 1}, as the template writes it"
                )
            if whole.startswith(text):
                spans.append((len(prompt), len(text)))
            else:
                yield Rendered(text=text, spans=((len(prompt), len(text)),))
        if spans:
            yield Rendered(text=whole, spans=tuple(spans))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompts: bool, marks: bool
    ) -> str:
        try:
            return _compile(self.source, marks=marks).render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompts,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateRefusalError("are refused by the chat template", f"it says: {error}") from error


def _unmark(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for number, piece in enumerate(text.split(_BEGIN)):
        inside, _, outside = piece.partition(_END) if number else ("", "", piece)
        if inside:
            spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), tuple(spans)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what is between is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> Node:
        """Put marks around the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Plain(_Generation):
    """The same without marks."""

    def _mark(self, caller: Macro) -> str:
        return str(caller())


@lru_cache(maxsize=8)
def _compile(source: str, *, marks: bool = False) -> Any:
    """Return the template, with what transformers offers to one."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation if marks else _Plain, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    offered: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": _format_now}
    environment.globals.update(offered)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _format_now(form: str) -> str:
    return datetime.now().strftime(form)


def find_tokenizer_file(tokenizer: str | Path) -> Path:
    """Return the `tokenizer.json` that a file or folder stands for."""
    path = Path(tokenizer)
    return path / TOKENIZER_FILE if path.is_dir() else path


def load_template(tokenizer_file: Path) -> ChatTemplate:
    """Read the template that lies beside a `tokenizer.json`: in `chat_template.jinja` or `tokenizer_config.json`.

    Raises:
        DataError: there is none, or it cannot be understood.
    """
    folder = tokenizer_file.parent
    try:
        config: Any = json.loads((folder / _CONFIG).read_bytes()) if (folder / _CONFIG).exists() else {}
        own = folder / _FILES[0]
        source: Any = own.read_text(encoding="utf-8") if own.exists() else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"the chat template beside {tokenizer_file} cannot be read ({error}). Fetch it again."
        ) from None
    if isinstance(source, list):  # several, by name
        named = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}  # pyright: ignore[reportUnknownArgumentType]
        source = named.get("default")
    if not isinstance(source, str):
        raise DataError(
            f"there is no chat template beside {tokenizer_file}, neither in {_FILES[0]} nor in {_CONFIG}: what a "
            "conversation looks like to this model is unknown. Name the folder of a model that was made to chat with "
            "--tokenizer, or put its template there."
        )
    names = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {
        name: str(value["content"] if isinstance(value, dict) else value) for name, value in names.items() if value
    }
    template = ChatTemplate(source=source, tokens={"bos_token": "", "eos_token": "", **tokens})
    try:
        _compile(source)
    except TemplateError as error:
        raise DataError(
            f"the chat template beside {tokenizer_file} is no template ({error}). Fetch it again."
        ) from None
    return template
