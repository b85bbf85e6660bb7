"""Where the text comes from: files, folders, globs and object stores, as a list of sources.

Everything goes through `pyarrow.fs`, so a local path and `s3://bucket/folder` differ only in their name. Credentials
and endpoints are those of the environment (`AWS_*`) or of the URI (`s3://bucket/key?endpoint_override=host:port`).

A file that is named is read. Of what a folder or a glob finds, what is no data is left out: hidden files, what stands
beside data to describe it, and kinds that we cannot read. What was taken and what was left out is told.
"""

# pyarrow.fs ships no types: what takes a file system takes Unknown
# pyright: reportUnknownParameterType=false
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePosixPath

from pyarrow import fs

from elastic.data.preparation import kjv
from elastic.data.preparation.readers import TEXT_DOCUMENT_CHARS, as_data_error, get_ending, get_endings, get_reader
from elastic.data.preparation.rows import NoText, TakeRow
from elastic.errors import DataError

__all__ = ["TEXT_DOCUMENT_CHARS", "Source", "find_sources"]

_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|change(s|log)|contributing|code_of_conduct|security)"
    r"([._-].*)?\.(md|txt|json)"
    r"|(requirements([._-].*)?|cmakelists)\.txt"
    r"|(dataset(_infos?|_dict)?|dataset_card|state|metadata|manifest|croissant|package(-lock)?|vocab|added_tokens|"
    r"special_tokens_map|.*\.index|(.*_)?config|tokenizer(_.*)?)\.json",
    re.IGNORECASE,
)
"""Names of files that describe data, code or models and are no data themselves, where all of a folder is asked for."""
_NAMES_TOLD = 5

OnNote = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """One file: its name, its size on storage, and how to stream its documents."""

    name: str
    size_bytes: int
    read: Callable[[], Iterator[str | NoText]]


def find_sources(
    inputs: Iterable[str | Path], *, text_key: str | TakeRow, on_note: OnNote = lambda _: None
) -> list[Source]:
    """List the files behind the inputs, each once, in the order of the inputs and sorted within each.

    Args:
        inputs: files, folders (searched to any depth), globs (`*`, `?`, `**`), URIs that pyarrow knows, or `kjv:`.
        text_key: the field (json) or column (parquet) that holds the text, or what makes one of a whole row.
        on_note: takes a line for the user about what was taken and what was left out.

    Raises:
        DataError: an input does not exist, holds no file that we can read, or the store refuses.
    """
    sources: dict[str, Source] = {}
    for item in map(str, inputs):
        found = [_find_kjv()] if item == "kjv:" else _find_files(item, text_key, on_note)
        sources.update((source.name, source) for source in found)
    if not sources:
        raise DataError("no input was named, so there is nothing to prepare. Name a file, a folder, a glob or kjv:")
    return list(sources.values())


def _find_kjv() -> Source:
    chapters = kjv.read_chapters()
    return Source("kjv:", sum(map(len, chapters)), partial(iter, chapters))


def _find_files(item: str, text_key: str | TakeRow, on_note: OnNote) -> list[Source]:
    with as_data_error(item):
        if "://" in item:
            filesystem, path = fs.FileSystem.from_uri(item)
        else:
            filesystem, path = fs.LocalFileSystem(), str(Path(item).expanduser().absolute())
        info = filesystem.get_file_info(path)
        is_named = info.type == fs.FileType.File
        base = path
        if is_named:
            found = [info]
        elif info.type == fs.FileType.Directory:
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        else:
            base, found = _match(filesystem, path)
    files = sorted((file for file in found if file.type == fs.FileType.File), key=attrgetter("path"))
    if not files:
        raise DataError(f"{item} does not exist, or no file is there or matches. Check the name: a glob needs quotes.")
    if any(file.base_name == "dataset_dict.json" for file in files):
        on_note(
            f"{item}: a dataset of several splits, and all are taken; name the folder of one, such as {item}/train, "
            "to take that"
        )
    left_out = {file.path: _why_not(file.path, base, is_named=is_named) for file in files}
    taken = [file for file in files if not left_out[file.path]]
    if not taken:
        _refuse(item, files[0].base_name, left_out[files[0].path])
    if not is_named:
        _tell(item, base, [file.path for file in taken], left_out, on_note)
    readers = [(file, get_reader(file.path)) for file in taken]
    return [
        Source(file.path, file.size, partial(read, filesystem, file.path, text_key)) for file, read in readers if read
    ]


def _why_not(path: str, base: str, *, is_named: bool) -> str:
    """Return why a file is left out; nothing if it is taken."""
    if not is_named:
        inside = PurePosixPath(path).relative_to(base)
        if any(part.startswith((".", "_")) for part in inside.parts):
            return "hidden"
        if _ABOUT_DATA.fullmatch(inside.name):
            return "about the data"
    return "" if get_reader(path) else "of a kind that is not read"


def _refuse(item: str, first: str, why: str) -> None:
    if why == "of a kind that is not read":
        raise DataError(
            f"{item} holds no file that we can read (the first is {first}): the ending tells the kind. "
            f"Use {get_endings()}."
        )
    raise DataError(
        f"{item} holds no data: {first} and what else there is are hidden files or about data. Name a file itself to "
        "train on it."
    )


def _tell(item: str, base: str, taken: Sequence[str], left_out: dict[str, str], on_note: OnNote) -> None:
    kinds = Counter(get_ending(path) for path in taken)
    on_note(f"{item}: took {len(taken)} files ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})")
    for why in sorted(set(left_out.values()) - {""}):
        names = [str(PurePosixPath(path).relative_to(base)) for path, reason in left_out.items() if reason == why]
        more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
        on_note(f"{item}: left out, {why}: {', '.join(names[:_NAMES_TOLD])}{more}")


def _match(filesystem: fs.FileSystem, pattern: str) -> tuple[str, list[fs.FileInfo]]:
    """Return the folder in which a glob begins to be one, and the files that it matches."""
    parts = PurePosixPath(pattern).parts
    depth = next((i for i, part in enumerate(parts) if set(part) & {"*", "?"}), None)
    if depth is None:
        return pattern, []
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(wild.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    base = str(PurePosixPath(*parts[:depth]))
    found = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    return base, [file for file in found if re.fullmatch(regex, file.path)]
