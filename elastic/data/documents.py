"""Where the text comes from: files, folders, globs and object stores, read as a stream of documents.

Everything goes through `pyarrow.fs`, so a local path and `s3://bucket/folder` differ only in their name. Credentials
and endpoints are those of the environment (`AWS_*`) or of the URI (`s3://bucket/key?endpoint_override=host:port`).
"""

# pyarrow.fs ships no types: what takes a file system takes Unknown
# pyright: reportUnknownParameterType=false
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from elastic.data import kjv
from elastic.errors import DataError

TEXT_DOCUMENT_CHARS = 1 << 14
"""A plain text file has no documents; it is cut at the first blank line after this many characters."""

_COMPRESSED = {".gz", ".zst", ".bz2", ".lz4"}


@dataclass(frozen=True)
class Source:
    """One file: its name, its size on storage, and how to stream its documents."""

    name: str
    size_bytes: int
    read: Callable[[], Iterator[str]]


def find_sources(inputs: Iterable[str | Path], *, text_key: str) -> list[Source]:
    """List the files behind the inputs, each once, in the order of the inputs and sorted within each.

    Args:
        inputs: files, folders (searched to any depth), globs (`*`, `?`, `**`), URIs that pyarrow knows, or `kjv:`.
        text_key: the field (jsonl) or column (parquet) that holds the text.

    Raises:
        DataError: an input does not exist, holds no file that we can read, or the store refuses.
    """
    sources: dict[str, Source] = {}
    for item in map(str, inputs):
        found = [_find_kjv()] if item == "kjv:" else _find_files(item, text_key)
        sources.update((source.name, source) for source in found)
    if not sources:
        raise DataError("no input was named, so there is nothing to prepare. Name a file, a folder, a glob or kjv:")
    return list(sources.values())


def _find_kjv() -> Source:
    chapters = kjv.read_chapters()
    return Source("kjv:", sum(map(len, chapters)), partial(iter, chapters))


def _find_files(item: str, text_key: str) -> list[Source]:
    with _as_data_error(item):
        if "://" in item:
            filesystem, path = fs.FileSystem.from_uri(item)
        else:
            filesystem, path = fs.LocalFileSystem(), str(Path(item).expanduser().absolute())
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            found = [info]
        elif info.type == fs.FileType.Directory:
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        else:
            found = _match(filesystem, path)
    files = sorted((file for file in found if file.type == fs.FileType.File), key=attrgetter("path"))
    if not files:
        raise DataError(f"{item} does not exist, or no file is there or matches. Check the name: a glob needs quotes.")
    readers = [(file, _get_reader(file.path)) for file in files]
    sources = [
        Source(file.path, file.size, partial(read, filesystem, file.path, text_key)) for file, read in readers if read
    ]
    if not sources:
        raise DataError(
            f"{item} holds no file that we can read (the first is {files[0].base_name}): the ending tells the kind. "
            f"Use {', '.join(_READERS)}, each also with {', '.join(sorted(_COMPRESSED))}."
        )
    return sources


def _match(filesystem: fs.FileSystem, pattern: str) -> list[fs.FileInfo]:
    parts = PurePosixPath(pattern).parts
    depth = next((i for i, part in enumerate(parts) if set(part) & {"*", "?"}), None)
    if depth is None:
        return []
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(wild.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    base = str(PurePosixPath(*parts[:depth]))
    found = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    return [file for file in found if re.fullmatch(regex, file.path)]


@contextmanager
def _as_data_error(name: str) -> Generator[None]:
    """Turn what storage and decoders raise into a message for the user."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8: {error.reason} (byte {error.object[error.start]:#04x}), and guessing would train on "
            f"garbage. Convert it, for example: iconv -f latin1 -t utf-8 {name}"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name} cannot be read: {error}. Check the name, the file and the credentials.") from error


@contextmanager
def _open_text(filesystem: fs.FileSystem, path: str) -> Generator[io.TextIOWrapper]:
    with _as_data_error(path), filesystem.open_input_stream(path, compression="detect", buffer_size=1 << 20) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig")


def _read_text(filesystem: fs.FileSystem, path: str, _text_key: str) -> Iterator[str]:
    """Yield a plain text file in pieces of bounded size, cut at blank lines where there are any."""
    with _open_text(filesystem, path) as file:
        lines: list[str] = []
        num_chars = 0
        while line := file.readline(TEXT_DOCUMENT_CHARS):
            lines.append(line)
            num_chars += len(line)
            blank = line.isspace()
            if (blank and num_chars >= TEXT_DOCUMENT_CHARS) or num_chars >= 4 * TEXT_DOCUMENT_CHARS:
                yield "".join(lines)
                lines, num_chars = [], 0
        if lines:
            yield "".join(lines)


def _read_jsonl(filesystem: fs.FileSystem, path: str, text_key: str) -> Iterator[str]:
    with _open_text(filesystem, path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON ({error}). Repair or remove the line.") from error
            text = row.get(text_key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{path}:{number} has no text under the key {text_key!r}; it has: {keys}. "
                    "Name the right one with --text-key."
                )
            yield text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair


def _read_parquet(filesystem: fs.FileSystem, path: str, text_key: str) -> Iterator[str]:
    with _as_data_error(path), filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        fields = {field.name: field.type for field in table.schema_arrow}
        if text_key not in fields or not _is_text(fields[text_key]):
            columns = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
            raise DataError(
                f"{path} has no text column {text_key!r}; it has: {columns}. Name the right one with --text-key."
            )
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


_READERS: dict[str, Callable[[fs.FileSystem, str, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _get_reader(path: str) -> Callable[[fs.FileSystem, str, str], Iterator[str]] | None:
    name = PurePosixPath(path)
    return _READERS.get(PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix)
