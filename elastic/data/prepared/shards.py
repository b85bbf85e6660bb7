"""Prepared data, opened: samples read from its shards, and checks before anything is rented."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic.config import RunConfig
from elastic.data.prepared.block_cache import BlockCache
from elastic.data.prepared.checksums import Verify, verify_files
from elastic.data.prepared.folder import Folder, LocalFolder
from elastic.data.prepared.format import (
    BLOCK_SUMS_FILE,
    DATASET_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DatasetInfo,
    Shard,
    Split,
    parse_info,
    read_info,
)
from elastic.data.prepared.remote_folder import RemoteFolder
from elastic.errors import DataError, StorageError
from elastic.storage import is_url, open_storage

_SHARDS_AT_ONCE = 16


class Dataset:
    """Token shards of a prepared folder; made by `open_dataset`.

    The shards of a split are one stream. Sample i with sequence length S is the S + 1 tokens from i * S on: S inputs,
    and their S labels one to the right.
    """

    def __init__(self, folder: Folder, info: DatasetInfo) -> None:
        self.folder = folder
        self.info = info
        self._starts = {
            split: list(accumulate((shard.num_tokens for shard in info.get_split(split).shards), initial=0))
            for split in SPLITS
        }

    def num_samples(self, split: Split, seq_len: int) -> int:
        """Return how many full samples the split holds."""
        return max(0, (self.info.get_split(split).num_tokens - 1) // seq_len)

    def read(self, split: Split, sample_id: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of a sample.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample_id < self.num_samples(split, seq_len):
            raise IndexError(f"sample {sample_id} of {self.num_samples(split, seq_len)} in {split} of {self.folder}")
        return self.read_tokens(split, sample_id * seq_len, seq_len + 1)

    def read_tokens(self, split: Split, position: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens of the split's stream, which must have them."""
        tokens = np.empty(count, np.int64)
        for shard, start, filled, num in self._cut(split, position, count):
            tokens[filled : filled + num] = self.folder.read_tokens(shard, start, num)
        return tokens

    def read_counted(self, split: Split, position: int, count: int) -> npt.NDArray[np.bool_] | None:
        """Tell which tokens of the split's stream count for the loss; None: all."""
        if not self.info.has_counted:
            return None
        counted = np.ones(count, np.bool_)
        for shard, start, filled, num in self._cut(split, position, count):
            part = self.folder.read_counted(shard, start, num)
            if part is not None:
                counted[filled : filled + num] = part
        return counted

    def read_ahead(self, split: Split, position: int, count: int) -> None:
        """Take note that these tokens will be read soon."""
        for shard, start, _, num in self._cut(split, position, count):
            self.folder.read_ahead(shard, start, num)

    def find_documents(self, split: Split, position: int, count: int) -> npt.NDArray[np.int64]:
        """Return where documents begin among these positions of the split's stream."""
        found: list[npt.NDArray[np.int64]] = []
        for shard, start, filled, num in self._cut(split, position, count):
            rows = self.folder.read_row_offsets(shard)[:-1]
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + num)].astype(np.int64)
            begin = position + filled - start
            if len(inside) and inside[0] == 0 and begin and not self._ends_document(split, begin):
                inside = inside[1:]  # it goes on from the shard before
            found.append(inside + begin)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def read_all_row_offsets(self, split: Split) -> None:
        """Have where rows begin in all shards of a split at hand, a few shards at a time."""
        with ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="row-offsets") as pool:
            for _ in pool.map(self.folder.read_row_offsets, self.info.get_split(split).shards):
                pass

    def _ends_document(self, split: Split, position: int) -> bool:
        return int(self.read_tokens(split, position - 1, 1)[0]) == self.info.eot_id

    def _cut(self, split: Split, position: int, count: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Yield (shard, position in it, tokens before, tokens) for each shard that a range touches."""
        starts, shards = self._starts[split], self.info.get_split(split).shards
        index, filled = bisect_right(starts, position) - 1, 0
        while filled < count:
            start = position + filled - starts[index]
            num = min(count - filled, shards[index].num_tokens - start)
            yield shards[index], start, filled, num
            filled, index = filled + num, index + 1


def open_dataset(
    path: str | Path, *, key: str = "data.path", verify: Verify = "changed", cache: BlockCache | None = None
) -> Dataset:
    """Open a folder that `solvent prepare` wrote, or a copy of it in an object store.

    Args:
        key: of the configuration, for messages.
        verify: which shards are hashed first (see `checksums.py`); in an object store, blocks are verified when read.
        cache: keeps what is read from an object store.

    Raises:
        DataError: not there, not prepared, torn, corrupt, or of another tokenizer.
    """
    dataset = open_unchecked(path, key=key, cache=cache)
    if isinstance(dataset.folder, LocalFolder):
        verify_files(dataset.folder.path, dataset.info, verify=verify)
    return dataset


def open_unchecked(path: str | Path, *, key: str = "data.path", cache: BlockCache | None = None) -> Dataset:
    """Open a prepared folder without looking at its shards.

    Raises:
        DataError: not there, or not prepared.
    """
    if is_url(str(path)):
        return _open_remote(str(path), key, cache)
    folder = Path(path)
    if not str(path) or not folder.exists():
        raise DataError(
            f"{key}={str(path)!r} does not exist. Make it with: solvent prepare INPUT --out {path or 'data/my-text'}"
        )
    if not (folder / DATASET_FILE).is_file():
        raise DataError(
            f"{key}={str(path)!r} is not a prepared folder: it has no {DATASET_FILE}. Prepare the text with "
            f"`solvent prepare {path} --out OTHER` and set {key}=OTHER."
        )
    return Dataset(LocalFolder(folder), read_info(folder))


def _open_remote(url: str, key: str, cache: BlockCache | None) -> Dataset:
    try:
        storage = open_storage(url)
        info = parse_info(storage.read(DATASET_FILE), f"{url}/{DATASET_FILE}")
        tokenizer, there = storage.read(TOKENIZER_FILE), set(storage.list())
    except StorageError as error:
        raise DataError(f"{key}={url!r} cannot be opened: {error}") from error
    except FileNotFoundError as error:
        raise DataError(
            f"{key}={url!r} is not a prepared folder: it has no {Path(str(error.filename)).name}. Prepare the data "
            f"into a folder with solvent prepare INPUT --out DIR, and copy all of DIR to {url}."
        ) from error
    except OSError as error:
        raise DataError(
            f"{key}={url!r} cannot be read ({error.strerror}). Check the URL, the credentials and the endpoint in the "
            "environment (AWS_*, GOOGLE_*, AZURE_*), of each node if the run is on a cluster."
        ) from error
    if hashlib.sha256(tokenizer).hexdigest() != info.tokenizer_sha256:
        raise DataError(
            f"{url}/{TOKENIZER_FILE} is not the file that the shards were made with: their tokens would mean other "
            "text. Copy the prepared folder to the store again."
        )
    needed = [shard.file for split in SPLITS for shard in info.get_split(split).shards]
    needed += [BLOCK_SUMS_FILE] if info.has_block_sums else []
    if missing := [name for name in needed if name not in there]:
        raise DataError(
            f"{url}/{missing[0]} is missing, dataset.json lists it (as {len(missing)} of {len(needed)} files). Copy "
            "the prepared folder to the store again."
        )
    return Dataset(RemoteFolder(storage, info, cache), info)


def check_vocab(info: DatasetInfo, config: RunConfig, *, key: str, path: str) -> None:
    """Refuse a model that has no row for a token of the data; what does not occur needs none.

    Raises:
        DataError: a token id is too large.
    """
    rows = config.model.vocab_size
    if info.needed_vocab_size <= rows:
        return
    what = f"holds the token id {info.largest_id}"
    if info.largest_id is None:
        what = f"may hold ids up to {info.vocab_size - 1} (prepared anew, it would say which it does hold)"
    raise DataError(
        f"model.vocab_size={rows} is too small: {key}={path!r} {what}, which would have no embedding. "
        f"Set model.vocab_size={info.vocab_size} for a new model. One that was trained with {rows} needs data of its "
        "own tokenizer: solvent prepare INPUT --tokenizer ITS/tokenizer.json"
    )


def check_not_empty(dataset: Dataset, split: Split, seq_len: int) -> None:
    """Refuse a split without a full sample.

    Raises:
        DataError: it has none.
    """
    if dataset.num_samples(split, seq_len):
        return
    num_tokens = dataset.info.get_split(split).num_tokens
    advice = f"Set data.seq_len to at most {num_tokens - 1}, or p" if num_tokens > 1 else "P"
    raise DataError(
        f"data.seq_len={seq_len} needs {seq_len + 1} tokens, the {split} split of {dataset.folder} has {num_tokens}: "
        f"there is not one full sample. {advice}repare more text"
        + (" with a larger --val-fraction, or with --val-fraction 0 to train without." if split == "val" else ".")
    )
