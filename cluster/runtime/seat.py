"""Where a run's coordinator is found. Hosts know no Ray, so they cannot look it up by its name and are told."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.runtime.link import connect


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The address of one coordinator."""

    epoch: int
    """The first that this coordinator took: one that follows it has a higher."""
    host: str
    port: int


def tell_seat(folder: Path, seat: Seat) -> bool:
    """Tell the host of a folder where its coordinator is; False if none listens there.

    It keeps to the newest coordinator that it was told of.
    """
    link = connect(folder)
    if link is None:
        return False
    is_told = link.send("seat", seat=asdict(seat))
    link.close()
    return is_told
