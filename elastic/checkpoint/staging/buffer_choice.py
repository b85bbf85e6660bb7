"""Which buffer a snapshot is copied to: one that nothing needs, or the one that is missed the least. Pure; no torch."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

Urgency = Literal["routine", "leaving"]
"""`leaving`: it is the last snapshot of its world, and the state that the next one starts from."""


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What buffers are needed for; None: nothing. All but `restored` are of this world, and alike on all ranks."""

    busy: Set[int]
    """They are being filled, or written to a storage or a disk."""
    newest: int | None
    """Holds the newest state that is whole on the nodes: what a lost trainer falls back on."""
    safe: int | None
    """Holds the newest of which every shard is on two nodes: what a lost node falls back on."""
    copying: int | None
    """Is being copied to another node."""
    restored: int | None
    """Holds this rank's part of what this world began with; other ranks may have theirs elsewhere."""


def choose_buffer(indices: Sequence[int], uses: Uses, urgency: Urgency, *, limit: int) -> int | None:
    """Return the buffer to fill; None, on all ranks or none, if the snapshot must wait.

    While one is filled its state is gone, and a world may end before it is filled on all ranks. A routine snapshot
    never costs the newest state, nor the one that a lost node falls back on, nor a copy under way: it waits for that if
    it must. One buffer alone is filled again and again, between its copies. The last snapshot of a world takes any
    place, the least missed first.

    Args:
        indices: of the buffers of this rank, at least `limit`; of those that are missed alike the first is taken.
        limit: how many are counted on; the same on all ranks, which may have more.
    """
    needed = uses.busy
    if urgency == "routine":
        needed = needed | ({uses.copying} if limit == 1 else {uses.copying, uses.safe, uses.newest}) - {None}
    if len(needed) >= limit:
        return None

    def cost(index: int) -> tuple[bool, bool, bool, bool]:
        is_needed_restored = index == uses.restored and uses.safe is None
        return index == uses.safe, index == uses.newest, is_needed_restored, index == uses.copying

    return min((index for index in indices if index not in needed), key=cost, default=None)
