"""Documents to tokens, in each process: which split, which tokens begin and end it, and texts too long for one go."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from elastic.data.prepared.format import SPLITS, Split, Tokens
from elastic.data.prepared.tokenizer import (
    SpecialTokens,
    find_bos_id,
    find_eot_id,
    get_special_tokens,
    get_split,
    get_vocab_size,
    load_tokenizer,
)

WINDOW_CHARS = 1 << 18
"""Encoding needs some 100 bytes per character: a longer document is encoded in windows."""
OVERLAP_CHARS = 1 << 11
_WINDOWS_AT_ONCE = 16

Divide = Literal["documents", "inside"]
"""A whole document goes to one split; or, where there are too few, the end of each is held out."""


@dataclass(frozen=True)
class Encoded:
    """Whole documents of one split: their tokens on end, each closed by the end-of-text token, and their lengths."""

    tokens: Tokens
    lengths: npt.NDArray[np.int64]
    num_spelled: int = 0
    """Documents in which a special token is written out."""
    spelled: frozenset[str] = frozenset()
    """These tokens."""
    counted: npt.NDArray[np.bool_] | None = None
    """Which tokens count for the loss; None: all."""
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    """Documents that could not be encoded, by what is wrong with them (`rows.NoText.kind`)."""
    first_left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of each kind, what is wrong with the first."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns documents into tokens; small and picklable, it goes to the worker processes."""

    tokenizer_file: Path
    eot_id: int
    bos_id: int | None
    vocab_size: int
    val_fraction: float
    divide: Divide = "documents"
    special_tokens: SpecialTokens = "text"

    @property
    def has_counted(self) -> bool:
        """It says of each token whether it counts."""
        return False

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: Sequence[str]) -> dict[Split, Encoded]:
        """Encode documents, each into its split."""
        tokenizer, special = _load_once(self.tokenizer_file, self.special_tokens)
        documents: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for text in texts:
            for split, part in split_text(text, self.val_fraction, self.divide):
                documents[split].append(part)
        return {split: self._encode_split(tokenizer, special, parts) for split, parts in documents.items()}

    def _encode_split(self, tokenizer: Tokenizer, special: re.Pattern[str] | None, texts: list[str]) -> Encoded:
        short = iter(
            tokenizer.encode_batch_fast([t for t in texts if len(t) <= WINDOW_CHARS], add_special_tokens=False)
        )
        first = [] if self.bos_id is None else [self.bos_id]
        ids = [
            [*first, *(next(short).ids if len(t) <= WINDOW_CHARS else encode_long(tokenizer, t)), self.eot_id]
            for t in texts
        ]
        tokens = [np.array(one, self.dtype) for one in ids]
        found = [set(special.findall(text)) for text in texts] if special else []
        return Encoded(
            tokens=np.concatenate(tokens) if tokens else np.empty(0, self.dtype),
            lengths=np.array([len(one) for one in ids], np.int64),
            num_spelled=sum(map(bool, found)),
            spelled=frozenset[str]().union(*found),
        )


def build_encoder(
    path: Path,
    *,
    eot_token: str | None,
    bos_token: str | None,
    special_tokens: SpecialTokens,
    val_fraction: float,
    divide: Divide,
) -> Encoder:
    """Return the encoder of a `tokenizer.json`; see `prepare` for the tokens.

    Raises:
        DataError: the tokenizer cannot be used, or has no such token.
    """
    tokenizer = load_tokenizer(path)
    return Encoder(
        tokenizer_file=path,
        eot_id=find_eot_id(tokenizer, eot_token),
        bos_id=find_bos_id(tokenizer, bos_token),
        vocab_size=get_vocab_size(tokenizer),
        val_fraction=val_fraction,
        divide=divide,
        special_tokens=special_tokens,
    )


@lru_cache(maxsize=1)
def _load_once(path: Path, special_tokens: SpecialTokens) -> tuple[Tokenizer, re.Pattern[str] | None]:
    tokenizer = load_tokenizer(path, special_tokens=special_tokens)
    special = sorted(get_special_tokens(tokenizer), key=len, reverse=True)
    return tokenizer, re.compile("|".join(map(re.escape, special))) if special else None


def split_text(text: str, val_fraction: float, divide: Divide) -> Iterator[tuple[Split, str]]:
    """Yield the parts of a document that have text, with their splits."""
    if divide == "documents":
        yield get_split(text, val_fraction), text
        return
    wanted = round(len(text) * (1 - val_fraction))
    ends = (text.rfind("\n", wanted // 2, wanted) + 1, text.rfind(" ", 0, wanted))
    cut = next((end for end in ends if end > 0), wanted)
    for split, part in zip(SPLITS, (text[:cut], text[cut:]), strict=True):
        if part and not part.isspace():
            yield split, part


def find_division(texts: Iterable[str], val_fraction: float, *, most_documents: int = 1000) -> Divide:
    """Look whether whole documents fill both splits; so few that chance left one empty are divided inside."""
    seen: set[Split] = set()
    for number, text in enumerate(texts, start=1):
        seen.add(get_split(text, val_fraction))
        if len(seen) == len(SPLITS) or number > most_documents:
            return "documents"
    return "inside"


def encode_long(
    tokenizer: Tokenizer, text: str, *, window_chars: int = WINDOW_CHARS, overlap_chars: int = OVERLAP_CHARS
) -> list[int]:
    """Return the ids of a long text as if it had been encoded whole, for any tokenizer.

    A tokenizer sees the start of a window as the start of a text (SentencePiece puts a space there) and a word that the
    end cuts as another one. So windows overlap, and two are joined in the middle of the overlap, where both came to the
    same tokens at the same places. Where they did not, the overlap grows, up to the whole text.
    """
    while overlap_chars < window_chars // 2 and window_chars < len(text):
        ids = _encode_windows(tokenizer, text, window_chars, overlap_chars)
        if ids is not None:
            return ids
        overlap_chars *= 8
    return tokenizer.encode(text, add_special_tokens=False).ids


def _encode_windows(tokenizer: Tokenizer, text: str, window_chars: int, overlap_chars: int) -> list[int] | None:
    """Return the ids; None if two windows disagree in the middle of their overlap."""
    starts = range(0, len(text) - overlap_chars, window_chars - overlap_chars)
    ids: list[int] = []
    last: list[int] = []
    for i in range(0, len(starts), _WINDOWS_AT_ONCE):
        group = starts[i : i + _WINDOWS_AT_ONCE]
        # where a token lies costs as much as the token, so it is asked for in the overlaps only
        windows = tokenizer.encode_batch_fast([text[at : at + window_chars] for at in group], add_special_tokens=False)
        overlaps = tokenizer.encode_batch([text[at : at + overlap_chars] for at in group], add_special_tokens=False)
        for start, window, overlap in zip(group, windows, overlaps, strict=True):
            joint = (0, 0) if start == 0 else _find_joint(last, window.ids, overlap, overlap_chars)
            if joint is None:
                return None
            del ids[len(ids) - joint[0] :]
            last = window.ids
            ids += last[joint[1] :]
    return ids


def _find_joint(left: list[int], right: list[int], overlap: Encoding, overlap_chars: int) -> tuple[int, int] | None:
    """Return how many tokens to drop at the end of `left` and at the start of `right`; None: they disagree.

    The overlap, encoded alone, begins as `right` does and ends as `left` does. If all three have the same tokens over
    the half of it that is far from its ends, they have them at the same places.
    """
    places = [(overlap.token_to_chars(index) or (0, 0))[0] for index in range(len(overlap.ids))]
    low, middle, high = (bisect_left(places, overlap_chars * quarter // 4) for quarter in (1, 2, 3))
    agreed, after = overlap.ids[low:high], len(places) - high
    is_same = right[low:high] == agreed == left[len(left) - after - len(agreed) : len(left) - after]
    return (len(places) - middle, middle) if agreed and is_same else None
