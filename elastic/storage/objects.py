"""An object store as a storage, through obstore (Rust's object_store): S3, Google Cloud Storage, Azure Blob.

A put makes an object appear whole or not at all, so there is no temporary name to clean up and nothing to sync.
`obstore` opens its connections in threads of its own: open a storage after a fork, never before it.
"""

import errno
import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_PART_BYTES = 32 * 2**20
"""At most 10,000 parts (S3) of this size: objects up to 312 GiB."""
_PARTS_AT_ONCE = 4
_STREAM_BYTES = 2**20

_PATIENT: "RetryConfig" = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
_ONCE: "RetryConfig" = {"max_retries": 0}

_ERRNO_OF_STATUS = {
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    405: errno.EINVAL,
    408: errno.ETIMEDOUT,
    416: errno.ENODATA,
    429: errno.EAGAIN,
    501: errno.ENOTSUP,
    503: errno.EAGAIN,
    504: errno.ETIMEDOUT,
    507: errno.ENOSPC,
}


class ObjectStorage:
    """See `elastic.storage.Storage`. Each request is tried again by the client while the store throttles or fails."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"))
        # whoever names an endpoint without TLS wants to be heard there; pyarrow takes it so as well
        options: ClientConfig = (
            {"allow_http": True} if any(endpoint.startswith("http://") for endpoint in endpoints) else {}
        )
        with self._explain(""):
            self._store: ObjectStore = from_url(self.url, client_options=options, retry_config=_PATIENT)
            # whether a create was applied is for the caller to find out; the client would say "exists" of its own
            self._store_once: ObjectStore = from_url(self.url, client_options=options, retry_config=_ONCE)

    def write(self, key: str, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        """Put in one request, or in parts that are tried again one by one."""
        counted = _Counted(chunks)
        parts, first = iter(counted), list[bytes | bytearray | memoryview]()
        for chunk in parts:
            first.append(chunk)
            if counted.num_bytes > _PART_BYTES:
                break
        is_small = counted.num_bytes <= _PART_BYTES
        with self._explain(key):
            obstore.put(
                self._store,
                key,
                b"".join(first) if is_small else chain(first, parts),
                use_multipart=not is_small,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        return counted.num_bytes

    def put_new(self, key: str, data: bytes) -> bool:
        """Put if absent (``If-None-Match: *``)."""
        with self._explain(key):
            try:
                obstore.put(self._store_once, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def read(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Get the object or one range of it."""
        with self._explain(key):
            if start == 0 and size is None:
                return bytes(obstore.get(self._store, key).bytes())
        end = self.get_size(key)
        if end is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{key}")
        out = bytearray(max(0, min(end, end if size is None else start + size) - start))
        self.read_into(key, start, memoryview(out))
        return bytes(out)

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Stream one range into the caller's memory."""
        rest = out.cast("B")
        if not rest:  # no request can ask for nothing
            return
        with self._explain(key):
            got = obstore.get(self._store, key, options={"range": (start, start + len(rest))})
            for data in got.stream(min_chunk_size=_STREAM_BYTES):
                rest[: len(data)] = data
                rest = rest[len(data) :]
        if rest:
            raise OSError(errno.ENODATA, f"ends {len(rest)} bytes too early", f"{self.url}/{key}")

    def get_size(self, key: str) -> int | None:
        """Ask for the head of the object."""
        try:
            with self._explain(key):
                return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        """List the folder that the prefix names; a store's own prefixes end at a slash."""
        folder = prefix.rpartition("/")[0]
        with self._explain(prefix):
            pages = obstore.list(self._store, folder or None)
            return sorted(found["path"] for page in pages for found in page if found["path"].startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete in bulk where the store can."""
        wanted = list(keys)
        if not wanted:
            return
        try:
            with self._explain(wanted[0]):
                obstore.delete(self._store, wanted)
        except FileNotFoundError:  # Google and Azure say so of one key, and the others may still be there
            for key in wanted:
                self._delete_one(key)

    def sweep(self, prefix: str) -> None:
        """Do nothing: see the Protocol."""

    def get_free_bytes(self) -> int | None:
        """Return None: nobody can say."""
        return None

    def _delete_one(self, key: str) -> None:
        try:
            with self._explain(key):
                obstore.delete(self._store, key)
        except FileNotFoundError:
            pass

    @contextmanager
    def _explain(self, key: str) -> Generator[None]:
        """Turn the client's errors into the `OSError` that a file system would have raised."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _shorten(error), f"{self.url}/{key}") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(errno.EACCES, _shorten(error), f"{self.url}/{key}") from error
        except BaseError as error:
            raise OSError(_get_errno(str(error)), _shorten(error), f"{self.url}/{key}") from error


class _Counted:
    """Counts the bytes that pass."""

    def __init__(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        self.num_bytes = 0
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes | bytearray | memoryview]:
        for chunk in self._chunks:
            self.num_bytes += memoryview(chunk).nbytes
            yield chunk


def _get_errno(text: str) -> int:
    status = re.search(r"status code: (\d{3})", text)
    if "QuotaExceeded" in text or "StorageFull" in text:  # what S3-compatible servers say when they are full
        return errno.ENOSPC
    if status is None:
        return errno.ETIMEDOUT if "timed out" in text else errno.EIO
    return _ERRNO_OF_STATUS.get(int(status[1]), errno.EIO if int(status[1]) >= 500 else errno.EINVAL)


def _shorten(error: Exception) -> str:
    """Return an error's own words on one line, without the client's internals."""
    text = str(error).partition("\n\nDebug source")[0]
    return " ".join(re.sub(r"<\?xml.*?\?>", "", text).split())[:400]
