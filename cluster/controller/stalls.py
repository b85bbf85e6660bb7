"""Who holds a world up, from what its members say when they make no progress. Pure.

One member that hangs makes all others wait for it in their next collective, so most of those that complain are not to
blame. A member that has said nothing is within limits of its own: it may be reading data or saving, and is waited for.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.types import Slot, Stalled
from elastic.ports import Where

_MAY_WAIT_FOR_PEERS: frozenset[Where] = frozenset({"in a collective", "waiting", "saving"})


@dataclass(kw_only=True)
class Stalls:
    """What members that are over their limit said last."""

    by_slot: dict[Slot, Stalled] = field(default_factory=dict[Slot, Stalled])
    _num_busy: int = 0
    """How many of them said that they wait for nobody."""

    def add(self, stall: Stalled) -> None:
        """Take what one says, in place of what it said before."""
        self._remove(stall.slot)
        self.by_slot[stall.slot] = stall
        self._num_busy += stall.where not in _MAY_WAIT_FOR_PEERS

    def forget_before(self, step: int) -> None:
        """Forget those who had not yet finished the step before this one."""
        for slot in [slot for slot, stall in self.by_slot.items() if stall.step < step]:
            self._remove(slot)

    def may_tell(self, num_alive: int) -> bool:
        """Tell, without looking at each of them, whether it may be clear by now who is to blame."""
        return self._num_busy > 0 or len(self.by_slot) >= num_alive

    def _remove(self, slot: Slot) -> None:
        stall = self.by_slot.pop(slot, None)
        self._num_busy -= stall is not None and stall.where not in _MAY_WAIT_FOR_PEERS


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
