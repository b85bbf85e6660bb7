"""Who holds a world up, from what its members say when they make no progress. Pure.

One member that hangs makes all others wait for it in their next collective, so most of those that complain are not to
blame. A member that has said nothing is within limits of its own: it may be reading data or saving, and is waited for.
"""

from collections.abc import Collection, Mapping

from cluster.types import Slot, Stalled
from elastic.ports import Where

_MAY_WAIT_FOR_PEERS: frozenset[Where] = frozenset({"in a collective", "waiting", "saving"})


def find_culprits(stalls: Mapping[Slot, Stalled], alive: Collection[Slot]) -> tuple[Slot, ...] | None:
    """Return the members that hold the others up.

    Args:
        stalls: what members that are over their limit said last.
        alive: all members whose trainers have not ended.

    Returns:
        None while it is too early to say; empty if the world hangs and nobody in particular is to blame.
    """
    complaints = {slot: stall for slot, stall in stalls.items() if slot in alive}
    silent = [slot for slot, stall in complaints.items() if stall.where == "silent"]
    if silent:
        return tuple(sorted(silent))
    busy = [slot for slot, stall in complaints.items() if stall.where not in _MAY_WAIT_FOR_PEERS]
    if busy and (len(busy) < len(complaints) or len(alive) == 1):
        return tuple(sorted(busy))
    return () if complaints.keys() == set(alive) else None


def describe(stalls: Mapping[Slot, Stalled], members: Collection[Slot], culprits: Collection[Slot]) -> str:
    """Say what is known, for people."""
    step = max(stall.step for stall in stalls.values())
    ranks = list(members)
    who = ", ".join(f"rank {ranks.index(slot)} is {_show(stalls[slot].where)}" for slot in culprits)
    return f"no progress after step {step}: {who or 'all ranks wait for each other'}"


def _show(where: Where) -> str:
    return "frozen (no sign of life)" if where == "silent" else where
