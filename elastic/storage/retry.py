"""Try again what may pass by itself: a throttled request, a dropped connection, a file system's hiccup."""

import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from elastic.storage import Storage

_T = TypeVar("_T")

_TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ESTALE,  # NFS: the server has forgotten a file that is still there
    }
)

_MAX_TRIES = 8
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_PATIENCE_S = 60.0
"""No new try starts this long after the first; an object store's client was patient by itself before."""


class RetryingStorage:
    """See `elastic.storage.Storage`. Pauses double, with jitter: ranks that failed together come back apart."""

    def __init__(
        self,
        storage: "Storage",
        *,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._sleep = sleep
        self._now_s = now_s

    @property
    def url(self) -> str:
        """Return the inner storage's."""
        return self._storage.url

    def write(self, key: str, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        """Write again from the start, unless the chunks are used up by the first try."""
        if isinstance(chunks, Iterator):
            return self._storage.write(key, chunks)
        return self._retry(lambda: self._storage.write(key, chunks))

    def put_new(self, key: str, data: bytes) -> bool:
        """Create; after a lost answer look whose bytes are there."""
        failed = False

        def put() -> bool:
            nonlocal failed
            try:
                if self._storage.put_new(key, data):
                    return True
                return failed and self._storage.read(key) == data
            except OSError:
                failed = True
                raise

        return self._retry(put)

    def read(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Read."""
        return self._retry(lambda: self._storage.read(key, start=start, size=size))

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        """Read all of `out` again, whatever the failed try had filled."""
        self._retry(lambda: self._storage.read_into(key, start, out))

    def get_size(self, key: str) -> int | None:
        """Ask."""
        return self._retry(lambda: self._storage.get_size(key))

    def list(self, prefix: str = "") -> list[str]:
        """List."""
        return self._retry(lambda: self._storage.list(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete; what the failed try had deleted is missing, which is fine."""
        wanted = list(keys)
        self._retry(lambda: self._storage.delete(wanted))

    def sweep(self, prefix: str) -> None:
        """Sweep."""
        self._retry(lambda: self._storage.sweep(prefix))

    def get_free_bytes(self) -> int | None:
        """Ask."""
        return self._retry(self._storage.get_free_bytes)

    def _retry(self, action: Callable[[], _T]) -> _T:
        start_s, pause_s = self._now_s(), _FIRST_PAUSE_S
        for tries_left in reversed(range(_MAX_TRIES)):
            try:
                return action()
            except OSError as error:
                if error.errno not in _TRANSIENT or not tries_left or self._now_s() - start_s > _PATIENCE_S:
                    raise
            self._sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        raise AssertionError("the last try returns or raises")
