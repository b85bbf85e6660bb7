"""How a host is led: it asks whoever has the seat of the coordinator, serves who answers, and looks for the next."""

import socket
import time
from collections.abc import Callable

from cluster.runtime.link import Link, Message
from cluster.runtime.seat import Seat

_CONNECT_S = 2.0
_FIRST_S = 5.0
"""A host that no coordinator has known came too late, or cannot reach it: whoever leads the run starts another one."""
_SEND_S = 10.0
"""A coordinator that takes nothing for this long is gone."""


class CoordinatorLink:
    """A host's connection to its run's coordinator, whichever that is by now.

    One that is asked has yet to answer: where a coordinator has just been killed, the kernel may still take a
    connection in its name, and the world that trains on must not end for nobody. Until then what it would be told is
    dropped; then it must be told how things stand.

    Args:
        seat: of the first coordinator.
        patience_s: so long one that had a coordinator looks for the next.
        get_hello: returns the fields of the first message.
        on_asked: takes the link of a coordinator that is asked, to listen to.
        on_lost: takes the link of one that is gone, to close.
    """

    def __init__(
        self,
        seat: Seat,
        *,
        patience_s: float,
        get_hello: Callable[[], Message],
        on_asked: Callable[[Link], None],
        on_lost: Callable[[Link], None],
    ) -> None:
        self.is_led = False
        """A coordinator has answered, and is not known to be gone."""
        self._seat = seat
        self._patience_s = patience_s
        self._get_hello, self._on_asked, self._on_lost = get_hello, on_asked, on_lost
        self._link: Link | None = None
        self._has_reached = False
        self._lost_s = time.monotonic()

    def look(self) -> str | None:
        """Ask whoever has the seat, unless that has been done; return why to give up, once it is time to."""
        looked_s = time.monotonic() - self._lost_s
        if self._has_reached and looked_s > self._patience_s:
            return "its coordinator ended"
        if not self._has_reached and looked_s > _FIRST_S:
            return f"no coordinator answers at {self._seat.host}:{self._seat.port}"
        if self._link is None:
            self._ask()
        return None

    def take_seat(self, seat: Seat) -> None:
        """Look for the coordinator in this seat, unless a newer one is known."""
        if seat.epoch <= self._seat.epoch:
            return
        has_moved = (seat.host, seat.port) != (self._seat.host, self._seat.port)
        self._seat = seat
        if has_moved:
            self._lose()

    def receive(self) -> list[Message]:
        """Return what the coordinator says, maybe nothing; "welcome" is its answer."""
        messages = self._link.receive() if self._link else []
        if messages is None:
            self._lose()
            return []
        self.is_led = self.is_led or any(message["kind"] == "welcome" for message in messages)
        return messages

    def tell(self, kind: str, **fields: object) -> bool:
        """Tell the coordinator, if one leads; False if it has not been told."""
        if not self.is_led or self._link is None:
            return False
        if not self._link.send(kind, **fields):
            self._lose()
        return self.is_led

    def _ask(self) -> None:
        try:
            connection = socket.create_connection((self._seat.host, self._seat.port), timeout=_CONNECT_S)
        except OSError:  # it is the seat of one that is gone
            return
        if connection.getsockname() == connection.getpeername():  # with a port of one's own one may meet oneself
            connection.close()
            return
        connection.settimeout(_SEND_S)
        self._link, self._has_reached = Link(connection), True
        self._on_asked(self._link)
        self._link.send("host", **self._get_hello())

    def _lose(self) -> None:
        """Go on without it for a while: another one may take its seat."""
        if self._link is None:
            return
        self._on_lost(self._link)
        self._link = None
        if self.is_led:
            self.is_led, self._lost_s = False, time.monotonic()
