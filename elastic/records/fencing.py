"""Generations fence what is over: every attempt of a run has one, taken from its storage, and only the newest writes.

A generation is an object `epochs/<8 digits>` that its taker created where there was none, so no two hold the same,
whatever they believe about each other. Its number is that of the attempt. A process that was frozen, cut off or
forgotten may come back at any time: it looks whether a newer generation exists before it lets others see what it wrote.
"""

import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from elastic.errors import StaleGenerationError
from elastic.ports import MetricSink
from elastic.records.rundir import format_utc
from elastic.storage import Storage

PREFIX = "epochs/"

_RETRY_S = 0.5

CHECK_EVERY_S = 2.0
"""Who did not look for this long may have slept: shorter than anybody waits before taking over."""


def take_generation(storage: Storage, number: int, *, who: str, patience_s: float = 0.0) -> None:
    """Take a generation and, with it, the right to write; all older ones are over.

    Args:
        who: is named to those who come too late.
        patience_s: how long to try again if the storage does not work.

    Raises:
        StaleGenerationError: it is taken, or a newer one is.
        OSError: the storage does not work.
    """
    record = {
        "by": who,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time_utc": format_utc(time.time()),
        "token": secrets.token_hex(8),  # no two takers write the same bytes: one of them lost
    }
    data, deadline_s = json.dumps(record).encode(), get_boottime_s() + patience_s
    while True:
        try:
            # What failed may have been done all the same.
            if not storage.put_new(_get_key(number), data) and storage.read(_get_key(number)) != data:
                raise _explain(storage, number - 1, number)
            return check_generation(storage, number)
        except OSError:
            if get_boottime_s() >= deadline_s:
                raise
        time.sleep(_RETRY_S)


def get_newest_generation(storage: Storage) -> int:
    """Return the number of the newest generation; 0 if none was ever taken."""
    numbers = (key.removeprefix(PREFIX) for key in storage.list(PREFIX))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def get_life(storage: Storage) -> str:
    """Return what tells this run from one of the same name, begun anew after its directory was removed.

    Raises:
        OSError: the storage does not work, or no generation was ever taken.
    """
    oldest = min(key for key in storage.list(PREFIX) if key.removeprefix(PREFIX).isdecimal())
    return json.loads(storage.read(oldest))["token"]


def read_generation(storage: Storage, number: int) -> bytes:
    """Return what its taker wrote down, which nobody else ever wrote.

    Raises:
        FileNotFoundError: it was never taken.
        OSError: the storage cannot be read.
    """
    return storage.read(_get_key(number))


def check_generation(storage: Storage, number: int) -> None:
    """Make sure that a generation is still the newest.

    Raises:
        StaleGenerationError: it is not.
        OSError: the storage cannot be listed, or is not there: an unmounted folder is an empty one.
    """
    newest = get_newest_generation(storage)
    if newest > number:
        raise _explain(storage, number, newest)
    if not newest:  # one that is only not seen yet, as on NFS, follows others
        raise FileNotFoundError(
            errno.ENOENT, "the run's files are gone, as from a folder that was unmounted", storage.url
        )


def get_boottime_s() -> float:
    """Return a monotonic time that goes on while this process or machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class GenerationGuard:
    """Looks at the generation again whenever the process may have slept since the last look; thread-safe.

    Args:
        check: raises a StaleGenerationError if the generation is over.
    """

    def __init__(
        self, check: Callable[[], None], *, every_s: float = CHECK_EVERY_S, now_s: Callable[[], float] = get_boottime_s
    ) -> None:
        self._check = check
        self._every_s = every_s
        self._now_s = now_s
        self._checked_s = -float("inf")

    def check_if_due(self) -> None:
        """Return at once if the last look was a moment ago.

        Raises:
            StaleGenerationError: the generation is over.
            OSError: the storage cannot be listed.
        """
        if self._now_s() - self._checked_s >= self._every_s:
            self.check()

    def check(self) -> None:
        """Look now.

        Raises:
            StaleGenerationError: the generation is over.
            OSError: the storage cannot be listed.
        """
        now_s = self._now_s()
        self._check()
        self._checked_s = now_s


class FencedSink:
    """A `MetricSink` that takes no row of a generation that is over: a process that slept through it may still count.

    A storage that cannot say so for the moment stops nothing: rows carry their attempt, and a newer one's count.
    """

    def __init__(self, sink: MetricSink, guard: GenerationGuard) -> None:
        self._sink = sink
        self._guard = guard

    def write(self, row: Mapping[str, object]) -> None:
        """Take one row.

        Raises:
            StaleGenerationError: the generation is over.
        """
        with suppress(OSError):
            self._guard.check_if_due()
        self._sink.write(row)

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def _get_key(number: int) -> str:
    return f"{PREFIX}{number:08d}"


def describe_taker(storage: Storage, number: int) -> str:
    """Return who took a generation, for a message."""
    try:
        taker = json.loads(storage.read(_get_key(number)))
        return f"{taker['by']} (process {taker['pid']} on {taker['host']}, {taker['time_utc']})"
    except (OSError, ValueError, KeyError):
        return "somebody else"


def _explain(storage: Storage, number: int, newest: int) -> StaleGenerationError:
    by = describe_taker(storage, newest)
    return StaleGenerationError(
        f"{by} took over the run at {storage.url} as attempt {newest}, so attempt {number} is over and writes nothing "
        "more; what it had committed before counts. Look at the other one, or train under another name (run=...)."
    )
