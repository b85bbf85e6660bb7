"""One thread that waits for many descriptors, and calls back."""

import os
import selectors
import socket
from collections.abc import Callable

from cluster.runtime.link import Link
from elastic.awake import AwakeClock


class EventLoop:
    """Calls back whoever watches a descriptor that can be read."""

    def __init__(self) -> None:
        self.awake_s = 0.0
        """As an `AwakeClock` tells it after each turn; turns must be shorter than a second."""
        self._clock = AwakeClock()
        self._selector = selectors.EpollSelector()

    def watch(self, source: Link | socket.socket | int, on_ready: Callable[[], object]) -> None:
        """Have a function called whenever there is something to read or the other end is gone, from now on this one."""
        if source in self._selector.get_map():
            self._selector.modify(source, selectors.EVENT_READ, on_ready)
        else:
            self._selector.register(source, selectors.EVENT_READ, on_ready)

    def unwatch(self, source: Link | int) -> None:
        """Close what was watched."""
        self._selector.unregister(source)
        if isinstance(source, Link):
            source.close()
        else:
            os.close(source)

    def get_descriptors(self) -> list[int]:
        """Return what is watched and the loop's own: none of it is a forked child's business."""
        return [self._selector.fileno(), *(key.fd for key in self._selector.get_map().values())]

    def turn(self, timeout_s: float) -> None:
        """Wait for the next event for so long; answer all that have come."""
        for key, _ in self._selector.select(timeout_s):
            if self._selector.get_map().get(key.fd) is key:  # an earlier event of this turn may have closed it
                key.data()
        self.awake_s = self._clock.get_s()
