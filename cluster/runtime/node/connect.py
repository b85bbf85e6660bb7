"""How agents, and who starts hosts, reach the host of their node."""

from pathlib import Path

from cluster.runtime.coordinator.seat import Seat
from cluster.runtime.messages import TO_AGENT, Bye, ClaimGranted, Exited, Fenced, SeatTold
from elastic.transport import Link, connect_unix

HostLink = Link[ClaimGranted | Fenced | Exited | Bye]


def connect(folder: Path) -> HostLink | None:
    """Connect to the host that listens in a folder; None if none does."""
    peer = connect_unix(folder)
    return Link(peer, TO_AGENT, sends="waiting") if peer else None


def tell_seat(folder: Path, seat: Seat) -> bool:
    """Tell the host of a folder where its coordinator is; False if none listens there.

    It keeps to the newest coordinator that it was told of.
    """
    link = connect(folder)
    if link is None:
        return False
    is_told = link.send(SeatTold(seat=seat))
    link.close()
    return is_told
