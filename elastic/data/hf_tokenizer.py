"""The tokenizer of prepared data as the files that `AutoTokenizer` of transformers reads. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic.data.format import DATASET_FILE, TOKENIZER_FILE, read_info
from elastic.data.tokenizer import load_tokenizer
from elastic.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HfTokenizer:
    """The files by name, and the id of the token that ends a document."""

    files: Mapping[str, bytes]
    eot_id: int


def read_tokenizer(folder: Path) -> HfTokenizer:
    """Return the tokenizer of a folder that `solvent prepare` wrote.

    Raises:
        DataError: the folder is not one.
        FileNotFoundError: there is no such folder.
    """
    info = read_info(folder)
    path = folder / TOKENIZER_FILE
    eot_token = load_tokenizer(path).id_to_token(info.eot_id)
    settings = {
        # the class that takes tokenizer.json as it is; a model's own class would put its own rules in place of ours
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eot_token,
        "clean_up_tokenization_spaces": False,
    }
    return HfTokenizer(
        files={
            TOKENIZER_FILE: path.read_bytes(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        },
        eot_id=info.eot_id,
    )


def check_tokenizer(data_path: str, tokenizer_json: bytes | None, *, origin: str) -> None:
    """Refuse to train a model of others on data that another tokenizer made; data that is not here is not looked at.

    Args:
        origin: where `tokenizer_json` is from, for the message; None: that model came without one.

    Raises:
        DataError: the two differ.
    """
    folder = Path(data_path)
    if tokenizer_json is None or not data_path or not (folder / DATASET_FILE).is_file():
        return
    if read_info(folder).tokenizer_sha256 != hashlib.sha256(tokenizer_json).hexdigest():
        raise DataError(
            f"data.path={data_path!r} was made with another tokenizer than {origin} has, so its token ids mean other "
            "text to this model. Prepare it anew: "
            f"solvent prepare INPUT --tokenizer {origin}/{TOKENIZER_FILE} --out DIR"
        )
