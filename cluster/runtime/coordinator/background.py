"""Blocking work on a thread of its own: the one that must answer hosts gives it away and hears of its end."""

import queue
import threading
import time
from collections.abc import Callable


class Background:
    """Does one job after the other, in the order in which they came; thread-safe.

    Args:
        name: of the thread.
        on_failure: takes what a job raised, on that thread; the jobs after it are done all the same.
    """

    def __init__(self, name: str, *, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._num_given = self._num_done = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, job: Callable[[], object]) -> None:
        """Have a job done after those that were given before it."""
        with self._changed:
            self._num_given += 1
            self._jobs.put(job)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all jobs so far are over; False if they are not in time."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            wanted = self._num_given
            return self._changed.wait_for(lambda: self._num_done >= wanted, until_s - time.monotonic())

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException as error:
                self._on_failure(error)
            finally:
                with self._changed:
                    self._num_done += 1
                    self._changed.notify_all()
