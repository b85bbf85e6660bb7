"""How fast the ways of a state are, as they were measured; from that, how long one takes. No torch here.

A time that was measured is that of one save under what went on then: the memory it was the first to touch, the copies
it waited for. Bytes and rates say what the next one needs.
"""

from collections import deque
from dataclasses import dataclass, field

_RECENT = 5


@dataclass
class Rate:
    """Of one way, in bytes per second.

    Args:
        assumed: until it was measured.
    """

    assumed: float
    _measured: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def measured(self, num_bytes: int, took_s: float) -> None:
        """Take what some bytes took."""
        if num_bytes > 0 and took_s > 0:
            self._measured.append(num_bytes / took_s)

    def estimate_s(self, num_bytes: int) -> float:
        """Return how long so many bytes take, if nothing else is in the way: the best of the last times."""
        return num_bytes / max(self._measured, default=self.assumed)


@dataclass
class Rates:
    """Of the ways of one process' states; they outlive its worlds."""

    to_host: Rate = field(default_factory=lambda: Rate(10e9))
    """From where training has it to memory that was found before. As long as it is not known the best is hoped for: a
    state that is handed over in vain costs a moment, one that is not costs steps."""
    to_new_host: Rate = field(default_factory=lambda: Rate(4e9))
    """To memory that the kernel finds meanwhile."""
    to_peer: Rate = field(default_factory=lambda: Rate(1e9))
    """To the memory of another node, in either direction; assumed is a network of 10 Gbit/s."""
