"""Documents that are there more than once."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

Duplicates = Literal["keep", "drop"]


class Sieve:
    """Lets each text pass once, if duplicates are to be dropped; 16 bytes of each are remembered."""

    def __init__(self, duplicates: Duplicates) -> None:
        self._seen: set[bytes] | None = set() if duplicates == "drop" else None
        self._num_dropped = 0

    def read(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield what has not passed before."""
        if self._seen is None:
            yield from texts
            return
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in self._seen:
                self._num_dropped += 1
            else:
                self._seen.add(digest)
                yield text

    def describe(self) -> str:
        """Return how many were dropped."""
        if self._seen is None:
            return ""
        total = len(self._seen) + self._num_dropped
        return f"left out {self._num_dropped:,} of {total:,} documents, which are equal to an earlier one"
