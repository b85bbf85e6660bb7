"""How a host is led: it calls the address of the coordinator, serves who answers, and looks for the next."""

import time
from collections.abc import Callable

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import TO_HOST, CoordinatorMessage, HostHello, HostMessage, Welcome
from elastic.transport import Dial, Link, WireError

_DIAL_S = 5.0
"""A coordinator that is busy for so long is asked again."""
_PAUSE_S = 0.25
"""A call that failed is made again after so long: one to a closed port of the own machine fails at once."""
_FIRST_S = 5.0
"""A host that no coordinator has known came too late, or cannot reach it: whoever leads the run starts another one."""
_SEND_S = 10.0
"""A coordinator that takes nothing for this long is gone."""
_SAY_EVERY_S = 60.0

CoordinatorMessages = Link[CoordinatorMessage]


class CoordinatorLink:
    """A host's connection to its run's coordinator, whichever that is by now.

    A stranger at the address of one that is gone is nobody until it has proved itself: the host goes on looking, says
    nothing to it and waits for nothing. One that has, has yet to answer: where a coordinator has just been killed, the
    kernel may still take a connection in its name, and the world that trains on must not end for nobody. Until then
    what it would be told is dropped; then it must be told how things stand.

    Args:
        address: of the first coordinator.
        secret: what it knows.
        loop: calls back for this.
        patience_s: so long one that had a coordinator looks for the next.
        get_hello: returns the first message.
        on_message: takes what the coordinator says; `Welcome` is its answer.
        on_lost: called when one that has answered is gone.
        say: takes a line for the log.
    """

    def __init__(
        self,
        address: CoordinatorAddress,
        *,
        secret: str,
        loop: EventLoop,
        patience_s: float,
        get_hello: Callable[[], HostHello],
        on_message: Callable[[CoordinatorMessage], None],
        on_lost: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.is_led = False
        """A coordinator has answered, and is not known to be gone."""
        self._address, self._secret, self._loop = address, secret, loop
        self._patience_s = patience_s
        self._get_hello, self._on_message, self._on_lost, self._say = get_hello, on_message, on_lost, say
        self._dial: Dial | None = None
        self._link: CoordinatorMessages | None = None
        self._has_reached = False
        self._lost_s = time.monotonic()
        self._said_s = float("-inf")
        self._call_from_s = 0.0

    def look(self) -> str | None:
        """Call the address, unless that has been done; return why to give up, once it is time to."""
        looked_s = time.monotonic() - self._lost_s
        if self._has_reached and looked_s > self._patience_s:
            return "its coordinator ended"
        if not self._has_reached and looked_s > _FIRST_S:
            return f"no coordinator answers at {self._address.host}:{self._address.port}"
        if self._dial:
            self._go_on()
        elif self._link is None and time.monotonic() >= self._call_from_s:
            self._call()
        return None

    def take_address(self, address: CoordinatorAddress) -> None:
        """Look for the coordinator at this address, unless a newer one is known."""
        if address.generation <= self._address.generation:
            return
        has_moved = (address.host, address.port) != (self._address.host, self._address.port)
        self._address = address
        if has_moved:
            self._lose()

    def tell(self, message: HostMessage) -> bool:
        """Tell the coordinator, if one leads; False if it has not been told."""
        if not self.is_led or self._link is None:
            return False
        if not self._link.send(message):
            self._lose()
        return self.is_led

    def _call(self) -> None:
        try:
            address = self._address
            self._dial = Dial((address.host, address.port), self._secret, purpose="coordinator", timeout_s=_DIAL_S)
        except WireError as error:
            self._tell_failure(error)
            return
        self._loop.watch(self._dial, self._go_on)

    def _go_on(self) -> None:
        """Take the next step of the call that is under way."""
        dial = self._dial
        assert dial is not None
        try:
            peer = dial.turn()
        except WireError as error:  # it is the address of one that is gone
            self._stop_dialling()
            self._tell_failure(error)
            return
        if peer is None:
            return
        self._stop_dialling()
        self._link = Link(peer, TO_HOST, sends="at once", stuck_s=_SEND_S)
        self._loop.watch(self._link, self._hear)
        self._link.send(self._get_hello())

    def _stop_dialling(self) -> None:
        if self._dial:
            self._has_reached = self._has_reached or self._dial.is_connected
            self._loop.unwatch(self._dial)
            self._dial = None

    def _tell_failure(self, error: WireError) -> None:
        now_s = time.monotonic()
        self._call_from_s = now_s + _PAUSE_S
        if now_s - self._said_s > _SAY_EVERY_S:
            self._said_s = now_s
            self._say(f"no coordinator: {error}")

    def _hear(self) -> None:
        link = self._link
        assert link is not None
        messages = link.receive()
        if messages is None:
            if link.fault:
                self._say(f"the connection to the coordinator broke: {link.fault}")
            self._lose()
            return
        for message in messages:
            if self._link is not link:  # what was before has ended it
                return
            self.is_led = self.is_led or isinstance(message, Welcome)
            self._on_message(message)

    def _lose(self) -> None:
        """Go on without it for a while: another one may take its place."""
        self._stop_dialling()
        if self._link is None:
            return
        self._loop.unwatch(self._link)
        self._link = None
        if self.is_led:
            self.is_led, self._lost_s = False, time.monotonic()
            self._on_lost()
