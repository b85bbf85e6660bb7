"""What `prepare` asks of conversations: how rows become texts, what encodes them, and what is told of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from elastic.data.preparation.chat.conversations import ChatKind, build_taker
from elastic.data.preparation.chat.encoder import ChatEncoder
from elastic.data.preparation.chat.template import ChatTemplate, find_tokenizer_file, load_template
from elastic.data.preparation.encoder import Encoder
from elastic.data.preparation.rows import TakeRow
from elastic.data.preparation.writer import SplitWriter
from elastic.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A corpus of conversations, and the model that they are written for."""

    tokenizer_file: Path
    template: ChatTemplate
    take: TakeRow
    max_tokens: int

    def extend(self, encoder: Encoder) -> ChatEncoder:
        """Return what encodes conversations with the tokenizer of an encoder of texts."""
        values = {field.name: getattr(encoder, field.name) for field in fields(Encoder)}
        return ChatEncoder(**values, template=self.template, max_tokens=self.max_tokens)


def open_chat(kind: ChatKind, tokenizer: str | Path | None, *, key: str, max_tokens: int, part: str) -> Chat:
    """Find the template that conversations are written with.

    Args:
        key: where the turns are; `text`: where they usually are.

    Raises:
        DataError: there is none, or it cannot be done so.
    """
    if tokenizer is None:
        raise DataError(
            f"--chat={kind} writes conversations as a model reads them, and which model is not said. Name its folder "
            "with --tokenizer HF_DIR."
        )
    if part:
        raise DataError(f"--part={part} is for text; conversations are prepared in one go. Leave --part out.")
    file = find_tokenizer_file(tokenizer)
    return Chat(
        tokenizer_file=file,
        template=load_template(file),
        take=build_taker(kind, None if key == "text" else key),
        max_tokens=max_tokens,
    )


def describe_left_out(writers: Sequence[SplitWriter], max_missing: float) -> Iterator[str]:
    """Yield what the template could not write, a line for each kind.

    Raises:
        DataError: that is more than an accident.
    """
    left_out = {kind: count for writer in writers for kind, count in writer.left_out.items()}
    first = {kind: why for writer in writers for kind, why in writer.first_left_out.items()}
    missing, written = sum(left_out.values()), sum(writer.num_documents for writer in writers)
    lines = [
        f"left out {count:,} conversations, which {kind}{'; the first: ' if first[kind] else ''}{first[kind]}"
        for kind, count in left_out.items()
    ]
    if missing > max(1, max_missing * (written + missing)):
        raise DataError(
            f"{missing:,} of {written + missing:,} conversations cannot be used with this chat template: "
            f"{'; '.join(lines)}. Take the template or the data that fit, or allow more with --max-missing."
        )
    yield from lines


def describe_counted(writers: Sequence[SplitWriter]) -> str:
    """Return how many tokens count; empty if all do."""
    counted, tokens = sum(w.num_counted for w in writers), sum(w.num_tokens for w in writers)
    return "" if counted == tokens else f"{counted:,} of {tokens:,} tokens count: those that assistants have to write"
