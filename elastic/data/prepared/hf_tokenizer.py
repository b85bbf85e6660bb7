"""The tokenizer of prepared data as the files that `AutoTokenizer` of transformers reads. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic.data.prepared.format import DATASET_FILE, TOKENIZER_FILE, DatasetInfo, read_info
from elastic.data.prepared.tokenizer import get_prefix, parse_tokenizer, replace_prefix
from elastic.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HfTokenizer:
    """The files by name, and the ids of the tokens that end and begin a document."""

    files: Mapping[str, bytes]
    eot_id: int
    bos_id: int | None
    """None: documents begin with their text."""
    tokenizer_sha256: str
    """Of the `tokenizer.json` that the data was made with."""


def read_tokenizer(folder: Path) -> HfTokenizer:
    """Return the tokenizer of a folder that `solvent prepare` wrote.

    Raises:
        DataError: the folder is not one.
        FileNotFoundError: there is no such folder.
    """
    return build_tokenizer(read_info(folder), (folder / TOKENIZER_FILE).read_bytes())


def build_tokenizer(info: DatasetInfo, tokenizer_json: bytes) -> HfTokenizer:
    """Return the tokenizer of prepared data, beginning a text as the data's documents begin.

    A prompt must begin with the token that the model was trained to see there, and with no other: such a row of the
    embedding was never trained.

    Raises:
        DataError: it cannot be loaded.
    """
    tokenizer = parse_tokenizer(tokenizer_json, TOKENIZER_FILE)
    bos_token = None if info.bos_id is None else tokenizer.id_to_token(info.bos_id)
    if get_prefix(tokenizer) != ([] if info.bos_id is None else [info.bos_id]):
        bos = None if info.bos_id is None or bos_token is None else (bos_token, info.bos_id)
        tokenizer_json = replace_prefix(tokenizer_json, bos)
    settings = {
        # the class that takes tokenizer.json as it is; a model's own class would put its own rules in place of ours
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": bos_token} if bos_token else {}),
        "eos_token": tokenizer.id_to_token(info.eot_id),
        "clean_up_tokenization_spaces": False,
    }
    return HfTokenizer(
        files={
            TOKENIZER_FILE: tokenizer_json,
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        },
        eot_id=info.eot_id,
        bos_id=info.bos_id,
        tokenizer_sha256=info.tokenizer_sha256,
    )


def is_prepared(data_path: str) -> bool:
    """Tell whether a prepared folder is here."""
    return bool(data_path) and (Path(data_path) / DATASET_FILE).is_file()


def check_tokenizer(data_path: str, tokenizer_json: bytes | None, *, key: str, origin: str) -> None:
    """Refuse to train a model of others on data that another tokenizer made; data that is not here is not looked at.

    Args:
        key: of the configuration that says where the data is, for the message.
        origin: where `tokenizer_json` is from, for the message; None: that model came without one.

    Raises:
        DataError: the two differ.
    """
    if tokenizer_json is None or not is_prepared(data_path):
        return
    if read_info(Path(data_path)).tokenizer_sha256 != hashlib.sha256(tokenizer_json).hexdigest():
        raise DataError(
            f"{key}={data_path!r} was made with another tokenizer than {origin} has, so its token ids mean other "
            "text to this model. Prepare it anew: "
            f"solvent prepare INPUT --tokenizer {origin}/{TOKENIZER_FILE} --out DIR"
        )
