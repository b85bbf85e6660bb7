"""Are these the bytes that `solvent prepare` wrote?

Sizes and the tokenizer's hash are checked at every open. A shard is hashed whenever its file is not one that was found
good before: a stamp keeps (size, change time) of every shard that passed. The kernel sets the change time at each write
and no copy carries it over, so a shard that was edited, torn or copied anew is read in full, once. A start after that
costs one stat per shard, however many terabytes there are. What a stamp cannot see is a disk that forgets without being
written to; `verify="all"` reads everything again.

The stamp lies in the folder (one reading serves all nodes that share it) or, where that is read-only, in this machine's
temporary folder.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from elastic.data.prepared.folder import Folder
from elastic.data.prepared.format import SPLITS, TOKENIZER_FILE, DatasetInfo, Shard, hash_file
from elastic.errors import DataError

Verify = Literal["changed", "all"]

_AGAIN = "Copy the folder again, or prepare the data again."


def verify_files(folder: Path, info: DatasetInfo, *, verify: Verify) -> None:
    """Check every file of a prepared folder against `dataset.json`.

    Args:
        verify: which shards are read in full: those that no stamp vouches for, or all.

    Raises:
        DataError: a file is missing, torn, corrupt or not the one the shards were made with.
    """
    _check_tokenizer(folder, info)
    shards = [shard for split in SPLITS for shard in info.get_split(split).shards]
    for shard in shards:
        _check_size(folder / shard.file, shard)
    known = _read_stamp(folder) if verify == "changed" else {}
    suspects = [shard for shard in shards if known.get(shard.file) != _fingerprint(folder, shard)]
    if suspects:
        _check_hashes(folder, suspects)
        write_stamp(folder, info)


def check_tokenizer_file(folder: Folder, info: DatasetInfo) -> Iterator[str]:
    """Yield what is wrong with the tokenizer of a folder, wherever that lies."""
    try:
        content = folder.read_file(TOKENIZER_FILE)
    except OSError as error:
        yield f"{folder}/{TOKENIZER_FILE} cannot be read: {error.strerror}"
        return
    if hashlib.sha256(content).hexdigest() != info.tokenizer_sha256:
        yield f"{folder}/{TOKENIZER_FILE} is not the file that the shards were made with"


def check_shard_file(path: Path, shard: Shard, *, name: str) -> Iterator[str]:
    """Read every byte of a shard; yield what is wrong with it.

    Args:
        name: what to call the file, of which `path` may be a copy.
    """
    try:
        _check_size(path, shard)
        _check_hashes(path.parent, [shard])
    except (DataError, OSError) as error:
        yield str(error).replace(str(path), name)


def _check_tokenizer(folder: Path, info: DatasetInfo) -> None:
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file() or hash_file(tokenizer) != info.tokenizer_sha256:
        raise DataError(
            f"{tokenizer} is not the file that the shards were made with: their tokens would mean other text. "
            "Put the old file back, or prepare the data again."
        )


def write_stamp(folder: Path, info: DatasetInfo) -> None:
    """Remember that all shards are good as they lie there; without a place to write to, the next open hashes again."""
    shards = [shard for split in SPLITS for shard in info.get_split(split).shards]
    text = json.dumps({shard.file: _fingerprint(folder, shard) for shard in shards})
    for path in _stamp_paths(folder):
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
            return
        except OSError:
            continue


def _read_stamp(folder: Path) -> dict[str, object]:
    for path in _stamp_paths(folder):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {}


def _stamp_paths(folder: Path) -> tuple[Path, Path]:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return folder / ".verified.json", Path(tempfile.gettempdir()) / f"solvent-verified-{os.getuid()}-{name}.json"


def _fingerprint(folder: Path, shard: Shard) -> list[object]:
    stat = (folder / shard.file).stat()
    return [stat.st_size, stat.st_ctime_ns, shard.sha256]


def _check_size(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing, dataset.json lists it. {_AGAIN}")
    if path.stat().st_size != shard.size_bytes:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, dataset.json says {shard.size_bytes}: a copy was cut "
            f"short. {_AGAIN}"
        )


def _check_hashes(folder: Path, shards: Sequence[Shard]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashing lets go of the interpreter lock
        hashes = pool.map(hash_file, (folder / shard.file for shard in shards))
        for shard, found in zip(shards, hashes, strict=True):
            if found != shard.sha256:
                raise DataError(
                    f"{folder / shard.file} is corrupt: its sha256 is {found[:12]}..., dataset.json says "
                    f"{shard.sha256[:12]}... Training on it would spoil the model. {_AGAIN}"
                )
