"""How the documents of one file are read: plain text, JSON lines, a JSON array, Parquet, Arrow as `datasets` saves it.

Everything goes through `pyarrow.fs`. The ending says what a file is meant to be, its first bytes say what it is. A key
that is not there as it is written leads inside: `messages.0.content` is the content of the first message.
"""

# pyarrow.fs ships no types: what takes a file system takes Unknown
# pyright: reportUnknownParameterType=false
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from elastic.data.preparation.first_bytes import HEAD_BYTES, describe_kind, find_codec, find_encoding, refuse_nul
from elastic.data.preparation.rows import NoText, TakeRow
from elastic.errors import DataError

TEXT_DOCUMENT_CHARS = 1 << 14
"""A plain text file has no documents; it is cut at the first blank line after this many characters."""

_COMPRESSED = {".gz", ".zst", ".bz2", ".lz4"}
_JSON_CHARS = 1 << 20
_MAX_JSON_CHARS = 1 << 28
"""The longest item of a JSON array."""

Rows = Iterator[str | NoText]
Key = str | TakeRow
"""Where a row has its text, or what makes one of the row."""


@contextmanager
def as_data_error(name: str) -> Generator[None]:
    """Turn what storage and decoders raise into a message for the user."""
    try:
        yield
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        byte = f" (byte {error.object[error.start]:#04x})" if error.start < len(error.object) else ""
        raise DataError(
            f"{name} is not {encoding}: {error.reason}{byte}, and guessing would train on garbage. Find out what it "
            f"is, and convert it; if it is Latin-1, for example: iconv -f latin1 -t utf-8 {name} > OUT"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name} cannot be read: {error}. Check the name, the file and the credentials.") from error


def get_endings() -> str:
    """Return what can be read, for a message."""
    return f"{', '.join(_READERS)}, each also with {', '.join(sorted(_COMPRESSED))}"


def get_ending(path: str) -> str:
    """Return what a name says of its kind, such as ``.jsonl.gz``."""
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix + name.suffix if name.suffix in _COMPRESSED else name.suffix


def get_reader(path: str) -> Callable[[fs.FileSystem, str, Key], Rows] | None:
    """Return how a file of this name is read."""
    return _READERS.get(f".{get_ending(path).split('.')[1]}") if get_ending(path) else None


@contextmanager
def _open_text(filesystem: fs.FileSystem, path: str, *, errors: str = "strict") -> Generator[io.TextIOWrapper]:
    with as_data_error(path):
        head = _read_head(filesystem, path, None)
        codec = find_codec(head)
        if codec:
            head = _read_head(filesystem, path, codec)
        elif PurePosixPath(path.lower()).suffix in _COMPRESSED and head:
            raise DataError(
                f"{path} cannot be read: its name says that it is compressed, and its first bytes are those of no "
                "compression. Give it the name of what it is."
            )
        encoding = find_encoding(head, path)
        with filesystem.open_input_stream(path, compression=codec, buffer_size=1 << 20) as stream:
            yield io.TextIOWrapper(stream, encoding=encoding, errors=errors)


def _read_head(filesystem: fs.FileSystem, path: str, codec: str | None) -> bytes:
    with filesystem.open_input_stream(path, compression=codec) as stream:
        return stream.read(HEAD_BYTES)


def _read_text(filesystem: fs.FileSystem, path: str, _text_key: Key) -> Rows:
    """Yield a plain text file in pieces of bounded size, cut at blank lines where there are any."""
    if not isinstance(_text_key, str):
        raise DataError(f"{path} is plain text, and conversations are rows. Name files of jsonl, json or parquet.")
    with _open_text(filesystem, path) as file:
        lines: list[str] = []
        num_chars = 0
        while line := file.readline(TEXT_DOCUMENT_CHARS):
            if "\0" in line:
                raise refuse_nul(path, line.encode()[:HEAD_BYTES])
            lines.append(line)
            num_chars += len(line)
            blank = line.isspace()
            if (blank and num_chars >= TEXT_DOCUMENT_CHARS) or num_chars >= 4 * TEXT_DOCUMENT_CHARS:
                yield "".join(lines)
                lines, num_chars = [], 0
        if lines:
            yield "".join(lines)


def _read_jsonl(filesystem: fs.FileSystem, path: str, text_key: Key) -> Rows:
    # what cannot be decoded is told of its line, not of the file
    with _open_text(filesystem, path, errors="surrogateescape") as file:
        yield from _read_lines(file, path, text_key)


def _read_json(filesystem: fs.FileSystem, path: str, text_key: Key) -> Rows:
    """Yield from JSON lines, which many call `.json`, or from what takes several lines: an array, or objects."""
    with _open_text(filesystem, path) as file:
        number, begin = 1, file.readline(_JSON_CHARS)
        while begin.isspace():
            number, begin = number + 1, file.readline(_JSON_CHARS)
        if begin.endswith("\n") and not begin.startswith("[") and _is_json(begin):
            yield _get_text(json.loads(begin), text_key, f"{path}:{number}")
            yield from _read_lines(file, path, text_key, first=number + 1)
        else:
            yield from _read_items(file, path, text_key, begin)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_lines(file: io.TextIOWrapper, path: str, text_key: Key, *, first: int = 1) -> Rows:
    for number, line in enumerate(file, start=first):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            if not line.isascii():
                line.encode()
            row = json.loads(line)
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) & 0xFF
            advice = f"if all is Latin-1, for example: iconv -f latin1 -t utf-8 {path} > OUT"
            yield NoText(where, f"is not UTF-8 (byte {byte:#04x}; {advice})", has_key=False, kind="are not UTF-8")
        except ValueError as error:
            yield NoText(where, f"is not JSON ({error})", has_key=False, kind="are not JSON")
        else:
            yield _get_text(row, text_key, where)


def _read_items(file: io.TextIOWrapper, path: str, text_key: Key, begin: str) -> Rows:
    """Yield from the items of one array, or from objects on end, with no more than a few of them in memory."""
    decoder, number = json.JSONDecoder(), 0
    is_array = begin.lstrip().startswith("[")
    rest, is_end = begin.lstrip()[1:] if is_array else begin, False
    while True:
        rest = rest.lstrip(" \t\r\n,")
        if is_array and rest.startswith("]"):
            return
        try:
            row, end = decoder.raw_decode(rest)
        except ValueError as error:
            more = "" if is_end or len(rest) > _MAX_JSON_CHARS else file.read(_JSON_CHARS)
            is_end = not more
            if more:
                rest += more
                continue
            if not rest and not is_array:
                return
            raise DataError(
                f"{path} is not JSON: item {number + 1} {'ends too early' if not rest else f'({error})'}. Write one "
                "object per line, or one array of objects."
            ) from error
        if end == len(rest) and not is_end:  # a number may go on in what is not yet read
            more = file.read(_JSON_CHARS)
            is_end = not more
            if more:
                rest += more
                continue
        number += 1
        rest = rest[end:]
        yield _get_text(row, text_key, f"{path} item {number}")


def _get_text(row: object, text_key: Key, where: str) -> str | NoText:
    if not isinstance(text_key, str):
        return text_key(row, where)
    text = _walk(row, text_key)
    if isinstance(text, str):
        return text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
    if text is _NOT_THERE:
        keys = ", ".join(cast(Mapping[str, Any], row)) if isinstance(row, dict) else type(row).__name__
        return NoText(where, f"has no text under the key {text_key!r}; it has: {keys}", has_key=False)
    kind = "null" if text is None else type(text).__name__
    return NoText(where, f"has {kind} under the key {text_key!r}, and no text", has_key=True)


_NOT_THERE = object()


def _walk(row: object, key: str) -> object:
    """Return what a key leads to: a name, or names and places in lists with dots between them."""
    if isinstance(row, dict) and key in row:
        return cast(Mapping[str, Any], row)[key]
    for part in key.split("."):
        if isinstance(row, dict) and part in row:
            row = cast(Mapping[str, Any], row)[part]
        elif isinstance(row, list) and re.fullmatch(r"-?\d+", part) and -len(row) <= int(part) < len(row):
            row = cast(list[Any], row)[int(part)]
        else:
            return _NOT_THERE
    return row


def _read_parquet(filesystem: fs.FileSystem, path: str, text_key: Key) -> Rows:
    with as_data_error(path), filesystem.open_input_file(path) as file:
        head = file.read(HEAD_BYTES)
        if not head.startswith(b"PAR1"):
            found = describe_kind(head, path)
            what = f"it is {found[0]}. {found[1]}" if found else "it is no Parquet file. Give it its right name."
            raise DataError(f"{path} cannot be read as its name says: {what}")
        file.seek(0)
        table = pq.ParquetFile(file)
        if not isinstance(text_key, str):
            yield from _read_whole(table.iter_batches(batch_size=256), text_key, path)
            return
        column = _find_column(table.schema_arrow, text_key, path)
        yield from _read_column(table.iter_batches(batch_size=256, columns=[column]), column, text_key, path)


def _read_arrow(filesystem: fs.FileSystem, path: str, text_key: Key) -> Rows:
    """Yield from what `datasets.save_to_disk` wrote, or its cache: Arrow's stream format, or its file format."""
    with as_data_error(path):
        _check_not_filtered(filesystem, path)
        with filesystem.open_input_file(path) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            if not isinstance(text_key, str):
                yield from _read_whole(batches, text_key, path)
                return
            column = _find_column(reader.schema, text_key, path)
            yield from _read_column((batch.select([column]) for batch in batches), column, text_key, path)


def _check_not_filtered(filesystem: fs.FileSystem, path: str) -> None:
    """Refuse rows that are not those that `datasets` would show: it keeps a selection of them in a file of its own."""
    state = str(PurePosixPath(path).parent / "state.json")
    if filesystem.get_file_info(state).type != fs.FileType.File:
        return
    with filesystem.open_input_stream(state) as file:
        content = json.loads(file.read())
    if isinstance(content, dict) and cast(Mapping[str, Any], content).get("_indices_data_files"):
        raise DataError(
            f"{path} belongs to a dataset that was filtered, sorted or shuffled, and holds the rows as they were "
            "before. Save it again: dataset.flatten_indices().save_to_disk(FOLDER)"
        )


def _find_column(schema: pa.Schema, text_key: str, path: str) -> str:
    """Return the column that has the text, or that has it inside."""
    fields = {field.name: field.type for field in schema}
    if text_key in fields and _may_be_text(fields[text_key]):
        return text_key
    outer = text_key.split(".", maxsplit=1)[0]
    if outer != text_key and outer in fields and pa.types.is_nested(fields[outer]):
        return outer
    columns = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
    raise DataError(f"{path} has no text column {text_key!r}; it has: {columns}. Name the right one with --text-key.")


def _read_whole(batches: Iterable[pa.RecordBatch], take: TakeRow, path: str) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield take(row, f"{path} row {number}")


def _read_column(batches: Iterable[pa.RecordBatch], column: str, text_key: str, path: str) -> Rows:
    number = 0
    for batch in batches:
        for value in batch.column(0).to_pylist():
            number += 1
            where = f"{path} row {number}"
            text = value if column == text_key else _walk({column: value}, text_key)
            if text is None or text is _NOT_THERE:
                why = "null in" if text is None else "nothing at"
                yield NoText(where, f"has {why} the column {text_key!r}", has_key=text is None)
            elif isinstance(text, bytes):
                yield _decode(text, text_key, where)
            elif isinstance(text, str):
                yield text
            else:
                yield NoText(where, f"has {type(text).__name__} in the column {text_key!r}, and no text", has_key=True)


def _decode(text: bytes, text_key: str, where: str) -> str | NoText:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"holds bytes in the column {text_key!r} that are not UTF-8 ({error.reason})"
        return NoText(where, why, has_key=True, kind="are not UTF-8")


def _may_be_text(kind: pa.DataType) -> bool:
    """Tell whether a column is text, however Arrow keeps it; bytes are what older writers make of text."""
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    )
    return any(test(kind) for test in tests)


_READERS: dict[str, Callable[[fs.FileSystem, str, Key], Rows]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
