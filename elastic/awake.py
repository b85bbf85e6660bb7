"""How long a process was awake. One that was stopped, or whose machine was, has not heard others meanwhile."""

import threading
import time

_LONGEST_S = 1.0
"""Between two looks; what is beyond was no time that the process ran. Somebody must look more often than that."""


class AwakeClock:
    """Seconds in which this process ran: by these it may tell that others are silent. Any thread may look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._awake_s, self._looked_s = 0.0, time.monotonic()

    def get_s(self) -> float:
        """Return the time of this clock, which starts at 0."""
        with self._lock:
            now_s = time.monotonic()
            self._awake_s += min(now_s - self._looked_s, _LONGEST_S)
            self._looked_s = now_s
            return self._awake_s
