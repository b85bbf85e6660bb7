"""One set prepared by several machines: each takes a part of the files, whoever is the last joins all.

`prepare --part 3/8 --out DIR` makes `DIR/part-3-of-8`, complete in itself. Once all parts are there they are joined:
their shards become shards of DIR, in the order of the parts, and `dataset.json` is written last. A join that was cut
short is done again by the next call.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elastic.data.preparation.documents import Source
from elastic.data.preparation.entropy import Counts, cross_entropy_nats
from elastic.data.prepared.checksums import write_stamp
from elastic.data.prepared.format import (
    BLOCK_SUMS_FILE,
    DATASET_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DatasetInfo,
    Shard,
    Split,
    SplitInfo,
    count_blocks,
    read_info,
    write_info,
)
from elastic.errors import DataError

_COUNTS_FILE = "counts.npz"


@dataclass(frozen=True)
class Part:
    """One of several, counted from 1."""

    number: int
    of: int

    def get_folder(self, out: Path) -> Path:
        """Return where it is prepared."""
        return out / f"part-{self.number}-of-{self.of}"


def parse_part(text: str) -> Part:
    """Return what `--part 3/8` says.

    Raises:
        DataError: it says nothing that can be.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.of:
        raise DataError(f"--part={text} is not one of several parts. Use --part 1/8 to --part 8/8 for 8 machines.")
    return part


def choose_sources(sources: Sequence[Source], part: Part) -> list[Source]:
    """Return the files of a part: of about the same size for all, and all parts are the whole.

    Raises:
        DataError: there are more parts than files.
    """
    if len(sources) < part.of:
        raise DataError(
            f"--part={part.number}/{part.of} of {len(sources)} files: a part takes whole files, so some would have "
            f"none. Use at most {len(sources)} parts, or cut the files."
        )
    chosen: list[list[int]] = [[] for _ in range(part.of)]
    sizes = [0] * part.of
    for index in sorted(range(len(sources)), key=lambda index: (-sources[index].size_bytes, sources[index].name)):
        smallest = min(range(part.of), key=lambda number: (sizes[number], len(chosen[number]), number))
        chosen[smallest].append(index)
        sizes[smallest] += sources[index].size_bytes
    return [sources[index] for index in sorted(chosen[part.number - 1])]


def write_counts(folder: Path, counts: dict[Split, Counts]) -> None:
    """Keep how often each token occurs, for the entropy of the whole."""
    with (folder / _COUNTS_FILE).open("wb") as file:
        np.savez_compressed(file, **counts)


def join_parts(out: Path, num_parts: int) -> DatasetInfo | list[int]:
    """Make one folder of all parts, if all are there.

    Returns:
        What it holds; or the numbers of the parts that are not there yet.

    Raises:
        DataError: the parts are not of one tokenizer.
    """
    folders = [Part(number, num_parts).get_folder(out) for number in range(1, num_parts + 1)]
    with (out / ".joining").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process
        if (out / DATASET_FILE).is_file():  # another machine was faster
            return read_info(out)
        if missing := [n for n, folder in enumerate(folders, start=1) if not (folder / DATASET_FILE).is_file()]:
            return missing
        info = _join(out, folders)
    for folder in folders:
        shutil.rmtree(folder)
    (out / ".joining").unlink(missing_ok=True)
    return info


def _join(out: Path, folders: Sequence[Path]) -> DatasetInfo:
    infos = [read_info(folder) for folder in folders]
    for folder, info in zip(folders, infos, strict=True):
        for what in ("tokenizer_sha256", "eot_id", "bos_id", "has_counted"):
            if getattr(info, what) != getattr(infos[0], what):
                raise DataError(
                    f"{folder} has another {what} than {folders[0]}: the parts were not prepared in the same way. "
                    "Prepare one of them again."
                )
    counts = {split: np.zeros(0, np.int64) for split in SPLITS}
    for folder in folders:
        with np.load(folder / _COUNTS_FILE) as own:
            counts = {split: own[split] + (counts[split] if counts[split].size else 0) for split in SPLITS}
    sums: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    splits: dict[Split, SplitInfo] = {}
    for split in SPLITS:
        shards: list[Shard] = []
        for number, (folder, info) in enumerate(zip(folders, infos, strict=True), start=1):
            shards += [_link(out, folder, shard, number) for shard in info.get_split(split).shards]
            sums[split].append(_read_sums(folder, info, split))
        splits[split] = SplitInfo(
            num_documents=sum(info.get_split(split).num_documents for info in infos),
            num_tokens=sum(info.get_split(split).num_tokens for info in infos),
            shards=tuple(shards),
        )
    shutil.copyfile(folders[0] / TOKENIZER_FILE, out / TOKENIZER_FILE)
    (out / BLOCK_SUMS_FILE).write_bytes(b"".join(part for split in SPLITS for part in sums[split]))
    train, val = counts["train"], counts["val"]
    info = replace(
        infos[0],
        train=splits["train"],
        val=splits["val"],
        largest_id=int(np.flatnonzero(train + val)[-1]),
        train_entropy_nats=cross_entropy_nats(train, train),
        val_cross_entropy_nats=cross_entropy_nats(val, train + 1) if val.any() else None,
    )
    write_stamp(out, info)
    write_info(out, info)
    return info


def _link(out: Path, folder: Path, shard: Shard, number: int) -> Shard:
    split, _, index = shard.file.partition("-")
    name = f"{split}-{number:04d}-{index}"
    (out / name).unlink(missing_ok=True)  # of a join that was cut short
    try:
        os.link(folder / shard.file, out / name)
    except OSError:  # some file systems cannot
        shutil.copyfile(folder / shard.file, out / name)
    return replace(shard, file=name)


def _read_sums(folder: Path, info: DatasetInfo, split: Split) -> bytes:
    before = 0 if split == "train" else sum(map(count_blocks, info.train.shards))
    own = sum(map(count_blocks, info.get_split(split).shards))
    return (folder / BLOCK_SUMS_FILE).read_bytes()[4 * before : 4 * (before + own)]
