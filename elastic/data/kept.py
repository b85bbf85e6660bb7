"""What a run keeps of its data beside its checkpoints: which data it was, and the tokenizer. No torch here.

    data/<16 digits>/dataset.json       as in the prepared folder; of a mixture, the sum of all, without shards
    data/<16 digits>/tokenizer.json
    data/<16 digits>/packed-...         how many rows its documents make, if they are packed

The digits are those of the identity in the manifests of the checkpoints, so that each checkpoint has the tokenizer that
its ids are of, however often the prepared folder was replaced or moved since.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from elastic.data.corpus import Corpus
from elastic.data.packing import PackedSamples, parse_index
from elastic.data.prepared.format import DATASET_FILE, SPLITS, TOKENIZER_FILE, DatasetInfo, dump_info, parse_info
from elastic.errors import DataError
from elastic.ports import DataIdentity
from elastic.records.rundir import DATA
from elastic.storage import Storage


def share_indices(run: Storage, corpus: Corpus, *, role: Literal["keeps", "reads"]) -> None:
    """Let a run find out once, and not in every trainer, how its documents are packed.

    Args:
        role: who keeps writes what is missing; who reads does without, and finds it out itself.

    Raises:
        OSError: the storage cannot be read or written.
    """
    for split in SPLITS:
        for name, samples in zip(corpus.sources, corpus.get_samples(split).sources, strict=True):
            if not isinstance(samples, PackedSamples):
                continue
            identity = corpus.sources[name].info.identity.name
            key = f"{DATA}/{identity}/{samples.index_name}"
            if samples.index is None and run.get_size(key) is not None:
                samples.index = parse_index(run.read(key))
            elif role == "keeps" and run.get_size(key) is None:
                run.write(key, [samples.get_index().dump()])


@dataclass(frozen=True, kw_only=True)
class KeptTokenizer:
    """The tokenizer of a run, as the data had it."""

    info: DatasetInfo
    tokenizer_json: bytes


def keep_data(run: Storage, corpus: Corpus) -> None:
    """Copy what describes the data into a run, unless it is there; the shards stay where they are.

    Raises:
        OSError: the storage cannot be written.
    """
    where = f"{DATA}/{corpus.identity.name}"
    if run.get_size(f"{where}/{DATASET_FILE}") is None:
        folder = next(iter(corpus.sources.values())).folder  # all sources have the same tokenizer
        run.write(f"{where}/{TOKENIZER_FILE}", [folder.read_file(TOKENIZER_FILE)])
        content = dump_info(corpus.info) if corpus.mixture else folder.read_file(DATASET_FILE)
        run.write(f"{where}/{DATASET_FILE}", [content])  # last: with it, both are there


def read_kept(run: Storage, identity: DataIdentity) -> KeptTokenizer | None:
    """Return the tokenizer of the data that a checkpoint was trained on; None if the run does not have it.

    Raises:
        DataError: what is there is damaged.
        OSError: the storage cannot be read.
    """
    where = f"{DATA}/{identity.name}"
    if any(run.get_size(f"{where}/{name}") is None for name in (TOKENIZER_FILE, DATASET_FILE)):
        return None
    info = parse_info(run.read(f"{where}/{DATASET_FILE}"), f"{run.url}/{where}/{DATASET_FILE}")
    tokenizer_json = run.read(f"{where}/{TOKENIZER_FILE}")
    if hashlib.sha256(tokenizer_json).hexdigest() != identity.tokenizer_sha256:
        raise DataError(
            f"{run.url}/{where}/{TOKENIZER_FILE} is not the tokenizer that the run was trained with: it was changed "
            "since. Put it back from the prepared data."
        )
    return KeptTokenizer(info=info, tokenizer_json=tokenizer_json)
