"""Text to token ids: a byte-level BPE trained here, or the `tokenizer.json` of a Hugging Face model."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from elastic.data.prepared.format import Split
from elastic.errors import DataError

SpecialTokens = Literal["text", "parse"]
"""What a special token that is written out in a text is: text like any other, or the token."""

EOT_TOKEN = "<|endoftext|>"
_KNOWN_EOT_TOKENS = (EOT_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|endofsentence|>", "[EOS]")


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


def load_tokenizer(path: Path, *, special_tokens: SpecialTokens = "text") -> Tokenizer:
    """Load a `tokenizer.json` so that it encodes all of a text.

    Raises:
        DataError: missing, or not a file of the `tokenizers` library.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer={path} cannot be loaded ({error.strerror}). Give the tokenizer.json of a Hugging Face model, "
            "or leave it out to train one."
        ) from error
    return parse_tokenizer(content, path, special_tokens=special_tokens)


def parse_tokenizer(content: bytes, path: Path | str, *, special_tokens: SpecialTokens = "text") -> Tokenizer:
    """Return the tokenizer that the bytes of a `tokenizer.json` describe.

    Raises:
        DataError: they do not.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more exact
        raise DataError(
            f"tokenizer={path} cannot be loaded ({error}). Give the tokenizer.json of a Hugging Face model, or leave "
            "it out to train one."
        ) from error
    tokenizer.no_truncation()  # many published files carry the limits of their model
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = special_tokens == "text"  # then "<|endoftext|>" in a text is text
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


def find_bos_id(tokenizer: Tokenizer, bos_token: str | None) -> int | None:
    """Return the id of the token that begins a document; None: none does.

    Args:
        bos_token: the one named; empty: none; None: what the tokenizer itself puts before a text, as Llama's does.
            A model that is prompted through that tokenizer sees it first, so it must have been trained on it.

    Raises:
        DataError: there is no such token, or the tokenizer puts several there.
    """
    if bos_token is None:
        prefix = get_prefix(tokenizer)
        if len(prefix) > 1:
            names = " ".join(str(tokenizer.id_to_token(token_id)) for token_id in prefix)
            raise DataError(
                f"the tokenizer begins a text with {len(prefix)} tokens ({names}), and a document can begin with one. "
                "Name it with --bos-token, or none with --bos-token ''."
            )
        return prefix[0] if prefix else None
    if not bos_token:
        return None
    token_id = tokenizer.token_to_id(bos_token)
    if token_id is None:
        raise DataError(
            f"the tokenizer has no token {bos_token} to begin a document with. Name one that it has with --bos-token, "
            "or none with --bos-token ''."
        )
    return token_id


def get_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer's post-processor puts before a text."""
    encoded = tokenizer.encode("a")
    num_special = next((i for i, mask in enumerate(encoded.special_tokens_mask) if not mask), 0)
    return encoded.ids[:num_special]


def replace_prefix(tokenizer_json: bytes, bos: tuple[str, int] | None) -> bytes:
    """Return a `tokenizer.json` that begins a text with this token and its id, or with none, and adds nothing else."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    old = content.get("post_processor")
    parts: list[dict[str, Any]] = old.get("processors", [old]) if old else []
    kept = [part for part in parts if part["type"] == "ByteLevel"]  # of offsets; it adds no tokens
    if bos:
        kept.append(_build_template(*bos))
    content["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _build_template(token: str, token_id: int) -> dict[str, Any]:
    def put(sequence: str, type_id: int) -> list[dict[str, Any]]:
        first = {"SpecialToken": {"id": token, "type_id": type_id}}
        return [first, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": put("A", 0),
        "pair": put("A", 0) + put("B", 1),
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def get_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens as they would stand in a text."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def get_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one; some vocabularies have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def get_split(text: str, val_fraction: float) -> Split:
    """Choose a document's split by its content: equal documents never stand on both sides, and more data moves none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"
