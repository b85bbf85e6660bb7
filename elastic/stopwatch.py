"""What the parts of a phase took, for a line of the log."""

import time


class Stopwatch:
    """Measures parts that follow each other."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin the first part; what was measured before is forgotten."""
        self._ended_s = time.monotonic()
        self._laps: list[str] = []

    def lap(self, what: str) -> None:
        """End a part and begin the next."""
        now_s = time.monotonic()
        self._laps.append(f"{what} {now_s - self._ended_s:.2f} s")
        self._ended_s = now_s

    def __str__(self) -> str:
        """Return them all."""
        return ", ".join(self._laps)
