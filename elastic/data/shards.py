"""Prepared data, opened: samples read from its shards, and checks before anything is rented."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic.config import RunConfig
from elastic.data.checksums import Verify, verify_files
from elastic.data.folder import Folder, LocalFolder
from elastic.data.format import DATASET_FILE, SPLITS, DatasetInfo, Shard, Split, read_info
from elastic.errors import DataError


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


def open_dataset(path: str | Path, *, key: str = "data.path", verify: Verify = "changed") -> Dataset:
    """Open a folder that `solvent prepare` wrote.

    Args:
        key: of the configuration, for messages.
        verify: which shards are hashed first (see `checksums.py`).

    Raises:
        DataError: not there, not prepared, torn, corrupt, or of another tokenizer.
    """
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
    info = read_info(folder)
    verify_files(folder, info, verify=verify)
    return Dataset(LocalFolder(folder), info)


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
