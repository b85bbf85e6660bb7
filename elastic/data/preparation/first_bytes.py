"""What a file is, by its first bytes: its name is a claim, and text that is none would be trained on as garbage."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.errors import DataError

HEAD_BYTES = 4096

_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
"""Compression that pyarrow undoes, by its magic number."""

_ENCODINGS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""By their byte order mark; the longer ones first."""


@dataclass(frozen=True)
class _Kind:
    """A format that is no text."""

    name: str
    magic: bytes
    advice: str
    offset: int = 0


_KINDS: Sequence[_Kind] = (
    _Kind("a Parquet file", b"PAR1", "Give it a name that ends with .parquet."),
    _Kind("a PDF", b"%PDF-", "Extract its text first, for example: pdftotext {path} OUT.txt"),
    _Kind("a zip archive (so are docx, xlsx and epub)", b"PK\x03\x04", "Unpack it or extract its text first."),
    _Kind("an xz archive", b"\xfd7zXZ\x00", "Unpack it first: xz -dk {path}"),
    _Kind("a 7z archive", b"7z\xbc\xaf\x27\x1c", "Unpack it first: 7z x {path}"),
    _Kind("a tar archive", b"ustar", "Unpack it into a folder first: tar xf {path}", offset=257),
    _Kind("an Arrow file", b"ARROW1", "Give it a name that ends with .arrow."),
    _Kind("an Avro file", b"Obj\x01", "Write it as Parquet or JSON lines first."),
    _Kind("an SQLite database", b"SQLite format 3", "Export its text as JSON lines first."),
    _Kind("a macOS resource file", b"\x00\x05\x16\x07", "Leave it out: it holds no data."),
    _Kind("an RTF document", b"{\\rtf", "Save it as plain text first."),
    _Kind("an old Office document", b"\xd0\xcf\x11\xe0", "Save it as plain text first."),
    _Kind("a program", b"\x7fELF", "Leave it out."),
    _Kind("an image", b"\x89PNG", "Leave it out."),
    _Kind("an image", b"\xff\xd8\xff", "Leave it out."),
    _Kind("a NumPy array", b"\x93NUMPY", "Give the text itself."),
)


def find_codec(head: bytes) -> str | None:
    """Return how a file is compressed, as pyarrow calls it."""
    return next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)


def describe_kind(head: bytes, path: str) -> tuple[str, str] | None:
    """Return what a file is that is no text, and what to do about it; None for what may be text."""
    for kind in _KINDS:
        if head[kind.offset :].startswith(kind.magic):
            return kind.name, kind.advice.format(path=path)
    codec = find_codec(head)
    return (f"compressed ({codec})", "Unpack it first.") if codec else None


def find_encoding(head: bytes, path: str) -> str:
    """Return the encoding of a text that begins with `head`.

    Raises:
        DataError: it is no text.
    """
    for mark, encoding in _ENCODINGS:
        if head.startswith(mark):
            return encoding
    found = describe_kind(head, path)
    if found:
        raise DataError(f"{path} is {found[0]}, not text: its bytes would be trained on as garbage. {found[1]}")
    if b"\0" in head:
        raise refuse_nul(path, head)
    return "utf-8"


def refuse_nul(path: str, near: bytes) -> DataError:
    """Return the error for a text with NUL bytes, `near` being some of it."""
    even, odd = near[0::2].count(0), near[1::2].count(0)
    if max(even, odd) > len(near) // 4:  # every other byte of Latin letters in UTF-16
        order = "utf-16be" if even > odd else "utf-16le"
        return DataError(
            f"{path} holds NUL bytes, so it is not UTF-8; it looks like UTF-16 without a byte order mark. Convert it: "
            f"iconv -f {order} -t utf-8 {path} > OUT"
        )
    return DataError(
        f"{path} holds NUL bytes, so it is not text but binary data, or damaged. Leave it out, or extract its text."
    )
