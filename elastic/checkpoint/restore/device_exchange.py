"""What ranks still have of a state on their devices goes to those that need it, over the world that restores it.

After a planned change the survivors have the state on their devices, and a newcomer needs its part of it. What no
device has is read from where it lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.checkpoint.exchange import Group, Parcels, can_send, gather_values
from elastic.checkpoint.format.read_plan import Piece, Read
from elastic.checkpoint.staging.device_cache import Rows


@dataclass(frozen=True)
class Held:
    """Chunks of one shard file that a rank has on its device."""

    file: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """Bytes of a chunk that a rank asks another one for."""

    holder: int
    """The rank that has them."""
    file: str
    name: str
    offset: int
    """In the file."""
    num_bytes: int


_HELD = Parcels[Sequence[Held]](Sequence[Held])
_WANTED = Parcels[Sequence[Wanted]](Sequence[Wanted])


class Transfers:
    """What one rank wants from the others, in the order in which they send it; pieces that follow each other as one."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []
        self._places: list[tuple[str, int]] = []
        """Of each: the flat tensor it goes to, and at which byte."""

    def add(self, holder: int, read: Read, piece: Piece, item_bytes: int) -> None:
        """Want one piece of a read."""
        offset, num_bytes, start = read.offset + piece.start, piece.num_elements * item_bytes, piece.target * item_bytes
        if self.wanted:
            last, (name, first) = self.wanted[-1], self._places[-1]
            stop = (last.holder, last.file, last.name, last.offset + last.num_bytes, first + last.num_bytes)
            if name == piece.name and stop == (holder, read.file, piece.name, offset, start):
                self.wanted[-1] = Wanted(holder, last.file, last.name, last.offset, last.num_bytes + num_bytes)
                return
        self.wanted.append(Wanted(holder, read.file, piece.name, offset, num_bytes))
        self._places.append((piece.name, start))

    def get_targets(self, flat: Mapping[str, Tensor]) -> list[Tensor]:
        """Return where each goes, as bytes."""
        return [
            flat[name].view(torch.uint8)[start : start + wanted.num_bytes]
            for wanted, (name, start) in zip(self.wanted, self._places, strict=True)
        ]


def fill_from_devices(
    reads: Sequence[Read],
    flat: Mapping[str, Tensor],
    rows: Sequence[Rows],
    *,
    device: torch.device,
    group: Group = None,
) -> list[Read]:
    """Fill what this rank or another one has on its device; return the reads that are left. All ranks call it.

    A read without pieces is there to verify a file, which this is not.

    Args:
        flat: tensors that each lie in a row, those that are on any device on this one.
        rows: what this rank has.
        group: all ranks. Where it cannot move tensors from device to device, only what this rank has is used.
    """
    rank, reaches_peers = dist.get_rank(group), can_send(device, group)
    own = {(each.file, name): each for each in rows for name in each.chunks}
    held: Sequence[Sequence[Held]] = [()] * rank + [[Held(each.file, tuple(each.chunks)) for each in rows]]
    if reaches_peers:
        held = gather_values(_HELD, held[rank], group)
    holders: dict[tuple[str, str], list[int]] = {}
    for other, chunks in enumerate(held):
        for chunk in chunks:
            for name in chunk.names:
                holders.setdefault((chunk.file, name), []).append(other)
    left: list[Read] = []
    transfers = Transfers()
    for read in reads:
        keys = [(read.file, piece.name) for piece in read.pieces]
        if not keys or not all(key in holders for key in keys):
            left.append(read)
            continue
        for key, piece in zip(keys, read.pieces, strict=True):
            target = flat[piece.name]
            if key in own:
                found = own[key].get(piece.name, read.offset + piece.start, piece.num_elements * target.itemsize)
                target[piece.target : piece.target + piece.num_elements].view(torch.uint8).copy_(found)
            else:  # ranks begin with different holders, where there are several
                holder = holders[key][rank % len(holders[key])]
                transfers.add(holder, read, piece, target.itemsize)
    if not reaches_peers:
        return left
    asked = gather_values(_WANTED, transfers.wanted, group)
    sends = [
        dist.P2POp(dist.isend, own[w.file, w.name].get(w.name, w.offset, w.num_bytes), group=group, group_peer=other)
        for other, wanted in enumerate(asked)
        for w in wanted
        if w.holder == rank
    ]
    receives = [
        dist.P2POp(dist.irecv, target, group=group, group_peer=wanted.holder)
        for wanted, target in zip(transfers.wanted, transfers.get_targets(flat), strict=True)
    ]
    if sends or receives:
        for work in dist.batch_isend_irecv([*sends, *receives]):
            work.wait()
    return left
