"""How agents, and who starts hosts, reach the host of their node."""

from pathlib import Path

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import TO_AGENT, Bye, ClaimGranted, CoordinatorMoved, Exited, Fenced
from elastic.transport import Link, connect_unix

HostLink = Link[ClaimGranted | Fenced | Exited | Bye]


def connect(folder: Path) -> HostLink | None:
    """Connect to the host that listens in a folder; None if none does."""
    peer = connect_unix(folder)
    return Link(peer, TO_AGENT, sends="waiting") if peer else None


def tell_address(folder: Path, address: CoordinatorAddress) -> bool:
    """Tell the host of a folder where its coordinator is; False if none listens there.

    It keeps to the newest coordinator that it was told of.
    """
    link = connect(folder)
    if link is None:
        return False
    is_told = link.send(CoordinatorMoved(address=address))
    link.close()
    return is_told
