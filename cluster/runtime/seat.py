"""Where a run's coordinator is found: a small file in each host's folder, written anew when another one takes over.

Hosts know no Ray, so they cannot look the coordinator up by its name. Whoever may start a host writes its seat as well.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

_NAME = "seat"


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The address of one coordinator."""

    epoch: int
    """The first that this coordinator took: one that follows it has a higher."""
    host: str
    port: int


def write_seat(folder: Path, seat: Seat) -> None:
    """Put a seat into a host's folder, all of it or nothing, unless a newer one is there."""
    present = read_seat(folder)
    if present is not None and present.epoch >= seat.epoch:
        return
    new = folder / f".{_NAME}-{secrets.token_hex(4)}"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(seat), file)
    new.replace(folder / _NAME)


def read_seat(folder: Path) -> Seat | None:
    """Return the seat in a host's folder; None if there is none."""
    try:
        return Seat(**json.loads((folder / _NAME).read_text()))
    except FileNotFoundError:
        return None
