"""A directory as a storage. What a method has returned survives a power cut: fsync of files and directories."""

import errno
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.direct import read_into, write_all

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that is still written; the name begins with a dot. It is no key."""


class LocalStorage:
    """See `elastic.storage.Storage`. Directories come and go with the files in them."""

    def __init__(self, root: str) -> None:
        self.url = root
        self._root = Path(root)
        self._was_there = False

    def write(self, key: str, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        """Write a temporary file, fsync it, rename it, fsync its directory."""
        path = self._get_path(key)
        with self._temporary(path) as (temporary, descriptor):
            size = sum(write_all(descriptor, chunk) for chunk in chunks)
            os.fsync(descriptor)
            temporary.rename(path)
        sync(path.parent)
        return size

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a temporary file, fsync it, link it to its name, which fails if the name is taken."""
        path = self._get_path(key)
        with self._temporary(path) as (temporary, descriptor):
            write_all(descriptor, data)
            os.fsync(descriptor)
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
        sync(path.parent)
        return True

    def read(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Read up to `size` bytes."""
        with self._get_path(key).open("rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Read straight into the caller's memory."""
        path = self._get_path(key)
        with path.open("rb", buffering=0) as file:
            num_bytes = read_into(file.fileno(), start, out)
        if num_bytes < out.nbytes:
            raise OSError(errno.ENODATA, f"ends {out.nbytes - num_bytes} bytes too early", str(path))

    def get_size(self, key: str) -> int | None:
        """Return the size of a regular file."""
        with suppress(FileNotFoundError):
            path = self._get_path(key)
            return path.stat().st_size if path.is_file() else None
        return None

    def list(self, prefix: str = "") -> list[str]:
        """Walk the directory that the prefix names."""
        keys = (path.relative_to(self._root).as_posix() for path in self._walk(prefix) if not _is_temporary(path))
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink the files and the directories that they leave empty."""
        directories: set[Path] = set()
        for key in keys:
            path = self._get_path(key)
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                directories.add(path.parent)
        for directory in directories:
            self._remove_empty(directory)

    def sweep(self, prefix: str) -> None:
        """Unlink temporary files and empty directories below the prefix."""
        for path in list(self._walk(prefix)):
            if _is_temporary(path):
                path.unlink(missing_ok=True)
        directory = self._get_directory(prefix)
        for found, _, _ in os.walk(directory, topdown=False):
            if Path(found) != directory:
                self._remove_empty(Path(found))

    def get_free_bytes(self) -> int | None:
        """Ask the file system that the directory, or what there is of its path, lies on."""
        existing = next((path for path in (self._root, *self._root.absolute().parents) if path.exists()), Path("/"))
        return shutil.disk_usage(existing).free

    def _get_path(self, key: str) -> Path:
        if not key or key.startswith("/") or ".." in key.split("/"):  # a stranger's manifest may name anything
            raise FileNotFoundError(errno.ENOENT, "No such key: it leads out of the storage", key)
        return self._root / key

    def _get_directory(self, prefix: str) -> Path:
        return self._root / prefix.rpartition("/")[0]

    def _walk(self, prefix: str) -> Iterator[Path]:
        for directory, _, names in os.walk(self._get_directory(prefix), onerror=_raise_unless_gone):
            yield from (Path(directory) / name for name in names)

    @contextmanager
    def _temporary(self, path: Path) -> Generator[tuple[Path, int]]:
        """Open a file beside `path` that is gone on exit, unless it was renamed."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._check_there()
        _make_directory(path.parent)
        self._was_there = True
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:  # another process has just removed the directory, which was empty
            _make_directory(path.parent)
            descriptor = os.open(temporary, flags, 0o666)
        try:
            yield temporary, descriptor
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)

    def _check_there(self) -> None:
        """Refuse to make the root anew: an unmounted folder's files would go to the disk below, and be gone with it."""
        self._was_there = self._was_there or self._root.is_dir()
        if self._was_there and not self._root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it was there, and is gone (unmounted or moved?)", str(self._root))

    def _remove_empty(self, directory: Path) -> None:
        """Remove a directory and its parents as far as they are empty, but never the root."""
        while True:
            with suppress(FileNotFoundError):
                sync(directory)
            if directory == self._root:
                return
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # there is something in it
                return
            directory = directory.parent


def _raise_unless_gone(error: OSError) -> None:
    """What cannot be listed is not empty; `os.walk` would say nothing."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    missing = [directory, *directory.parents]
    missing = missing[: next((i for i, path in enumerate(missing) if path.is_dir()), len(missing))]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file has the name of a directory
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
    for path in reversed(missing):
        sync(path.parent)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)
