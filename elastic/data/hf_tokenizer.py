"""The tokenizer of prepared data as the files that `AutoTokenizer` of transformers reads. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic.data.format import TOKENIZER_FILE, read_info
from elastic.data.tokenizer import load_tokenizer


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
