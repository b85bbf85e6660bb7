"""Conversations to tokens, in each process, with a bit for each: whether it is one that the assistant has to write."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from elastic.data.preparation.chat.template import ChatTemplate, Rendered, TemplateRefusalError
from elastic.data.preparation.encoder import Encoded, Encoder
from elastic.data.prepared.format import SPLITS, Split
from elastic.data.prepared.tokenizer import get_special_tokens, get_split, load_tokenizer

_SAID = ("content", "reasoning_content", "tool_calls", "name")
"""What of a turn becomes text."""


@dataclass(frozen=True, kw_only=True)
class ChatEncoder(Encoder):
    """Turns conversations (`conversations.py`) into tokens and what of them counts."""

    template: ChatTemplate
    max_tokens: int = 0
    """Longer ones are left out. 0: none is."""

    @property
    def has_counted(self) -> bool:
        """Only assistants' tokens do."""
        return True

    def encode(self, texts: Sequence[str]) -> dict[Split, Encoded]:
        """Encode conversations, each into its split."""
        tokenizer, special = _load_once(self.tokenizer_file)
        found: dict[Split, list[tuple[list[int], list[bool]]]] = {split: [] for split in SPLITS}
        left_out: Counter[str] = Counter()
        first: dict[str, str] = {}
        for text in texts:
            try:
                documents = self._encode_one(text, tokenizer, special)
            except TemplateRefusalError as refusal:
                left_out[refusal.kind] += 1
                first.setdefault(refusal.kind, refusal.why)
                continue
            found[get_split(text, self.val_fraction)] += documents
        return {"train": self._join(found["train"], left_out=left_out, first=first), "val": self._join(found["val"])}

    def _encode_one(
        self, text: str, tokenizer: Tokenizer, special: frozenset[str]
    ) -> list[tuple[list[int], list[bool]]]:
        content = json.loads(text)
        _refuse_special(content["messages"], special)
        documents: list[tuple[list[int], list[bool]]] = []
        for rendered in self.template.split(content["messages"], content.get("tools", ())):
            encoding = tokenizer.encode(rendered.text, add_special_tokens=False)
            counted = find_counted(encoding, rendered, special)
            ids = list(encoding.ids)
            if not any(counted):
                raise TemplateRefusalError("have no token of the assistant's")
            if self.max_tokens and len(ids) > self.max_tokens:
                raise TemplateRefusalError(
                    f"are longer than {self.max_tokens:,} tokens", f"one has {len(ids):,} (--max-tokens)"
                )
            if ids[-1] != self.eot_id:  # ends a document, and is nobody's word
                ids, counted = [*ids, self.eot_id], [*counted, False]
            documents.append((ids, counted))
        return documents

    def _join(
        self,
        documents: Sequence[tuple[list[int], list[bool]]],
        *,
        left_out: Mapping[str, int] | None = None,
        first: Mapping[str, str] | None = None,
    ) -> Encoded:
        return Encoded(
            tokens=np.array([one for ids, _ in documents for one in ids], self.dtype),
            lengths=np.array([len(ids) for ids, _ in documents], np.int64),
            counted=np.array([one for _, counted in documents for one in counted], np.bool_),
            left_out=left_out or {},
            first_left_out=first or {},
        )


def find_counted(encoding: Encoding, rendered: Rendered, special: frozenset[str]) -> list[bool]:
    """Return which tokens have characters of the stretches that count.

    What stands between the token that ends a turn and the next turn (a line break) is the template's, and does not
    count: no model is asked for it.
    """
    # each of these lists is made anew whenever it is asked for
    offsets: list[tuple[int, int]] = encoding.offsets
    tokens: list[str] = encoding.tokens
    counted, done = [False] * len(offsets), 0
    owners: npt.NDArray[np.int32] = np.full(len(rendered.text) + 1, -1, np.int32)
    for number, (start, end) in enumerate(rendered.spans):
        owners[start:end] = number
    spans: dict[int, list[int]] = {}
    for index, (start, end) in enumerate(offsets):
        start, done = min(start, done) if end > done else start, max(done, end)  # noqa: PLW2901 (blanks are cut off)
        owner = int(owners[start:end].max(initial=-1))
        if owner >= 0:
            counted[index] = True
            spans.setdefault(owner, []).append(index)
    for indices in spans.values():
        ends = [place for place, index in enumerate(indices) if tokens[index] in special]
        rest = indices[ends[-1] + 1 :] if ends else []
        if rest and rendered.text[offsets[indices[ends[-1]]][1] : offsets[rest[-1]][1]].isspace():
            for index in rest:
                counted[index] = False
    return counted


def _refuse_special(messages: Sequence[Mapping[str, object]], special: frozenset[str]) -> None:
    for number, message in enumerate(messages, start=1):
        said = "\n".join(map(str, (message[name] for name in _SAID if name in message)))
        found = next((token for token in special if token in said), None)
        if found is not None:
            raise TemplateRefusalError("have a special token written out in a turn", f"{found} in turn {number}")


@lru_cache(maxsize=1)
def _load_once(path: Path) -> tuple[Tokenizer, frozenset[str]]:
    tokenizer = load_tokenizer(path, special_tokens="parse")
    return tokenizer, frozenset(get_special_tokens(tokenizer))
