"""Text to token ids: a byte-level BPE trained here, or the `tokenizer.json` of a Hugging Face model."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from elastic.data.format import SPLITS, Split, Tokens
from elastic.errors import DataError

EOT_TOKEN = "<|endoftext|>"
_KNOWN_EOT_TOKENS = (EOT_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|endofsentence|>", "[EOS]")
_PIECE_CHARS = 1 << 18  # encoding needs some 100 bytes per character: a long document goes in pieces


@dataclass(frozen=True)
class Encoded:
    """Whole documents of one split: their tokens on end, each closed by the end-of-text token, and their lengths."""

    tokens: Tokens
    lengths: npt.NDArray[np.int64]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; any text can be encoded, whatever it was trained on.

    Raises:
        DataError: vocab_size has no room for all bytes and the end-of-text token.
    """
    alphabet = ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"vocab_size={vocab_size} has no room for the {len(alphabet)} bytes and the end-of-text token. "
            f"Use at least {len(alphabet) + 1}."
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json` so that it encodes all of a text, and only the text.

    Raises:
        DataError: missing, or not a file of the `tokenizers` library.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise DataError(
            f"tokenizer={path} cannot be loaded ({error}). Give the tokenizer.json of a Hugging Face model, or leave "
            "it out to train one."
        ) from error
    tokenizer.no_truncation()  # many published files carry the limits of their model
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    return tokenizer


def find_eot_id(tokenizer: Tokenizer, eot_token: str | None) -> int:
    """Return the id of the end-of-text token: the one named, else the first known one.

    Raises:
        DataError: there is none.
    """
    for token in (eot_token,) if eot_token else _KNOWN_EOT_TOKENS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    names = eot_token or " or ".join(_KNOWN_EOT_TOKENS)
    raise DataError(
        f"the tokenizer has no token {names}, and one must stand between documents. Name one that it has with "
        "--eot-token."
    )


def get_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one; some vocabularies have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def get_split(text: str, val_fraction: float) -> Split:
    """Choose a document's split by its content: equal documents never stand on both sides, and more data moves none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens; small and picklable, it goes to the worker processes."""

    tokenizer_file: Path
    eot_id: int
    vocab_size: int
    val_fraction: float

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: Sequence[str]) -> dict[Split, Encoded]:
        """Encode documents, each into its split."""
        tokenizer = _load_once(self.tokenizer_file)
        documents: dict[Split, list[list[str]]] = {split: [] for split in SPLITS}
        for text in texts:
            documents[get_split(text, self.val_fraction)].append(list(_cut(text)))
        encoded: dict[Split, Encoded] = {}
        for split, cut in documents.items():
            pieces = iter(tokenizer.encode_batch_fast([p for parts in cut for p in parts], add_special_tokens=False))
            ids = [[i for _ in parts for i in next(pieces).ids] + [self.eot_id] for parts in cut]
            tokens = [np.array(one, self.dtype) for one in ids]
            encoded[split] = Encoded(
                tokens=np.concatenate(tokens) if tokens else np.empty(0, self.dtype),
                lengths=np.array([len(one) for one in ids], np.int64),
            )
        return encoded


@lru_cache(maxsize=1)
def _load_once(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _cut(text: str) -> Iterator[str]:
    """Cut a long text before spaces, where byte-level BPE begins a new word anyway."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind(" ", start + 1, start + _PIECE_CHARS)
        end = end if end > 0 else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
