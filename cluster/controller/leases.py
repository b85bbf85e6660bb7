"""Which slots Ray Train has no use for any more, from who holds what at this moment. Pure.

A slot without an agent is the rule rather than a loss: whatever changes, Ray Train ends all of its agents and forms a
whole new group, and how long that takes is a matter of the machine's load, not of the slot's health. So no time is
measured here: a slot is surplus only beside a whole group that does without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.types import Slot


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The agent that holds a slot: of which of Ray's worker groups, and how many agents that group has."""

    group: int
    group_size: int


def find_surplus(holders: Mapping[Slot, Holder | None]) -> frozenset[Slot]:
    """Return the slots that nobody holds although every agent of the newest group holds one.

    What is not known makes nobody surplus: a coordinator that has just begun meets the hosts one by one, and the group
    is not whole before the last of its agents was seen. Nor is it while one of them is gone, for Ray Train then forms
    another. An agent of an older group that comes late neither makes the newest one whole nor keeps it from being so;
    the slot that it holds is its own until Ray ends it.
    """
    held = [holder for holder in holders.values() if holder is not None]
    newest = max(held, key=lambda holder: holder.group, default=None)
    if newest is None or sum(1 for holder in held if holder.group == newest.group) < newest.group_size:
        return frozenset()
    return frozenset(slot for slot, holder in holders.items() if holder is None)
