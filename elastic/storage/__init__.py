"""Where a run's bytes become durable: a directory, or an object store. No torch here.

    open_storage("runs/first")          a directory that all nodes see: fsync, rename, link
    open_storage("s3://bucket/first")   an object store (also gs://, az://): conditional and multipart puts

Keys are relative to the URL and slash-separated. Whatever fails is an `OSError` whose `errno` tells what to do, whose
`filename` tells where; what may pass by itself (throttling, a dropped connection, a stale handle) was tried again
before it is raised. Credentials and endpoints come from the environment (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from elastic.errors import StorageError
from elastic.storage.faulty import FAULTS_VARIABLE, FaultyStorage
from elastic.storage.local import LocalStorage
from elastic.storage.retry import RetryingStorage

Buffer = bytes | bytearray | memoryview

OBJECT_STORES = ("s3", "gs", "az")


class Storage(Protocol):
    """One place for one run's files; threads may share it, but a fork may not cross it."""

    @property
    def url(self) -> str:
        """Return what the keys are relative to: a path or a URL."""
        ...

    def write(self, key: str, chunks: Iterable[Buffer]) -> int:
        """Let an object appear with all bytes of `chunks`, durable, or not at all; replace what is there.

        An error that `chunks` raises leaves nothing behind and passes through. Chunks that can be iterated over again
        (a list, not a generator) are sent again after a failure that may pass.

        Returns:
            The bytes written.
        """
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Create a small object, durable, unless the key exists; of several writers exactly one gets True.

        When an answer was lost, what is there is compared with `data`: writers must not put the same bytes.
        """
        ...

    def read(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes from `start`, or what there is until the end.

        Raises:
            FileNotFoundError: there is no such key.
        """
        ...

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `start`.

        Raises:
            FileNotFoundError: there is no such key.
            OSError: the object ends before (ENODATA), or it cannot be read.
        """
        ...

    def get_size(self, key: str) -> int | None:
        """Return an object's size in bytes; None if there is no such key."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return all keys that start with `prefix`, sorted."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, durably; a missing key is fine."""
        ...

    def sweep(self, prefix: str) -> None:
        """Remove what writes that were cut short have left below `prefix`; nobody may be writing there.

        In an object store these are multipart uploads, which no key shows: a lifecycle rule of the bucket removes them.
        """
        ...

    def get_free_bytes(self) -> int | None:
        """Return how much more fits; None if nobody can say."""
        ...


def is_url(storage: str) -> bool:
    """Tell whether a `storage` is an object store's URL and not a path."""
    return "://" in storage


def join_url(storage: str, name: str) -> str:
    """Return the path or URL of what is called `name` below `storage`."""
    return f"{storage.rstrip('/')}/{name}" if is_url(storage) else str(Path(storage) / name)


def check_url(storage: str) -> None:
    """Refuse a URL that `open_storage` does not know, before anything is opened.

    Raises:
        StorageError: it is one.
    """
    scheme, _, rest = storage.partition("://")
    if is_url(storage) and (scheme not in OBJECT_STORES or not rest.strip("/")):
        raise StorageError(
            f"storage={storage!r} is no place that can be opened: give a path, or a URL with a bucket such as "
            f"{', '.join(f'{known}://bucket/folder' for known in OBJECT_STORES)}."
        )


def open_storage(url: str | Path) -> Storage:
    """Return the storage at a path or URL; nothing is created or contacted yet.

    Raises:
        StorageError: the URL is of no known kind, or the environment lacks what its kind needs.
    """
    text = str(url)
    check_url(text)
    if is_url(text):
        from elastic.storage.objects import ObjectStorage  # noqa: PLC0415 (a native library that paths do not need)

        try:
            storage: Storage = ObjectStorage(text)
        except OSError as error:
            raise StorageError(
                f"storage={text!r} cannot be opened ({error.strerror}). Set what is missing in the environment (AWS_*, "
                "GOOGLE_*, AZURE_*), of each node if the run is on a cluster."
            ) from error
    else:
        storage = LocalStorage(text)
    control = os.environ.get(FAULTS_VARIABLE)
    return RetryingStorage(FaultyStorage(storage, Path(control)) if control else storage)
