"""One thread that waits for many descriptors, and calls back."""

import os
import selectors
import socket
from collections.abc import Callable
from typing import Any

from elastic.awake import AwakeClock
from elastic.transport import Acceptor, Dial, Link

Source = Link[Any] | Acceptor | Dial | socket.socket | int


class EventLoop:
    """Calls back whoever watches a descriptor that can be read, and sends what links could not send at once."""

    def __init__(self) -> None:
        self.awake_s = 0.0
        """As an `AwakeClock` tells it after each turn; turns must be shorter than a second."""
        self._clock = AwakeClock()
        self._selector = selectors.EpollSelector()
        self._links: set[Link[Any]] = set()
        self._sending: set[Link[Any]] = set()
        """Those whose peer had no room."""

    def watch(self, source: Source, on_ready: Callable[[], object]) -> None:
        """Have a function called whenever there is something to read or the other end is gone, from now on this one."""
        if source in self._selector.get_map():
            self._selector.modify(source, selectors.EVENT_READ, on_ready)
        else:
            self._selector.register(source, selectors.EVENT_READ, on_ready)
        if isinstance(source, Link):
            self._links.add(source)
            self._sending.discard(source)

    def unwatch(self, source: Source) -> None:
        """Close what was watched."""
        self.forget(source)
        if isinstance(source, int):
            os.close(source)
        else:
            source.close()

    def forget(self, source: Source) -> None:
        """Watch it no more, but leave it open."""
        self._selector.unregister(source)
        if isinstance(source, Link):
            self._links.discard(source)
            self._sending.discard(source)

    def get_descriptors(self) -> list[int]:
        """Return what is watched and the loop's own: none of it is a forked child's business."""
        within = [
            descriptor
            for key in self._selector.get_map().values()
            if isinstance(key.fileobj, (Acceptor, Dial))
            for descriptor in key.fileobj.get_descriptors()
        ]
        return list({self._selector.fileno(), *(key.fd for key in self._selector.get_map().values()), *within})

    def turn(self, timeout_s: float) -> None:
        """Wait for the next event for so long; answer all that have come."""
        for link in self._links:
            if link.has_backlog != (link in self._sending):
                self._follow_backlog(link)
        for key, events in self._selector.select(timeout_s):
            current = self._selector.get_map().get(key.fd)
            if current is None or current.data is not key.data:  # an earlier event of this turn may have closed it
                continue
            if events & selectors.EVENT_READ:
                key.data()
        for link in list(self._sending):
            link.flush()
        self.awake_s = self._clock.get_s()

    def _follow_backlog(self, link: Link[Any]) -> None:
        key = self._selector.get_key(link)
        self._selector.modify(link, selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_backlog else 0), key.data)
        (self._sending.add if link.has_backlog else self._sending.discard)(link)
