"""What a rank that leaves has on its device goes to the devices of those that stay, before the world ends.

The next world then needs nothing from the host of a node that may be gone, and does not wait for the slow way there and
back. The shard in host memory is still made, and is where the state comes from if this fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.checkpoint.exchange import Parcels, gather_values
from elastic.checkpoint.format.sharding import Entry
from elastic.checkpoint.staging.device_cache import Rows, sum_blocks

_SPARE_BYTES = 4 * 2**30
"""What stays free on a device that takes rows over."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of a shard file in the copy of it on a device."""

    name: str
    offset: int
    """In the file."""
    start: int
    """In the copy."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one rank says before a world ends."""

    leaves: bool
    """Its node is not in the next world."""
    room_bytes: int = 0
    """What it can take."""
    file: str = ""
    num_bytes: int = 0
    """Of its copy."""
    chunks: Sequence[Chunk] = ()
    """None: it has no whole copy on its device."""


@dataclass(frozen=True)
class Stretch:
    """A part of the copy of a rank that leaves, for one that stays."""

    giver: int
    taker: int
    start: int
    stop: int


@dataclass(frozen=True)
class TakenOver:
    """How that went."""

    rows: list[Rows] = field(default_factory=list[Rows])
    """What this rank has got."""
    is_whole: bool = False
    """All that leaves is with those that stay: the same on all ranks."""


_OFFERS = Parcels[Offer](Offer)
_SUMS = Parcels[Sequence[int]](Sequence[int])


def plan_stretches(offers: Sequence[Offer]) -> list[Stretch] | None:
    """Return who gives what to whom, in equal parts; None if nobody stays, a copy is missing or there is no room."""
    stayers = [rank for rank, offer in enumerate(offers) if not offer.leaves]
    leavers = [rank for rank, offer in enumerate(offers) if offer.leaves]
    if not stayers or not all(offer.chunks for offer in offers):
        return None
    stretches: list[Stretch] = []
    for giver in leavers:
        offer = offers[giver]
        starts = [chunk.start for chunk in offer.chunks]
        cuts = [offer.num_bytes * part // len(stayers) for part in range(1, len(stayers))]
        edges = [0, *(next((start for start in starts if start >= cut), offer.num_bytes) for cut in cuts)]
        edges.append(offer.num_bytes)
        stretches += [
            Stretch(giver, taker, start, stop)
            for taker, (start, stop) in zip(stayers, pairwise(edges), strict=True)
            if start < stop
        ]
    for taker in stayers:
        if sum(each.stop - each.start for each in stretches if each.taker == taker) > offers[taker].room_bytes:
            return None
    return stretches


def take_over(
    offer: Offer,
    memory: Tensor | None,
    *,
    device: torch.device,
    votes: dist.ProcessGroup,
    group: dist.ProcessGroup | None = None,
) -> TakenOver:
    """Give what this rank has to those that stay, or take a part of what those that leave have; all ranks call it.

    What has come is compared by its sums: after an abort, collectives of NCCL end without an error.

    Args:
        memory: the copy that the offer speaks of, ready on the current stream.
        votes: all ranks, on the host.
        group: all ranks, on the device.
    """
    rank = dist.get_rank(votes)
    offers = gather_values(_OFFERS, offer, votes)
    stretches = plan_stretches(offers)
    if stretches is None:
        return TakenOver()
    own = [each for each in stretches if rank in (each.giver, each.taker)]
    parts = [_get_part(each, memory, rank, device) for each in own]
    ops = [
        dist.P2POp(
            dist.isend if each.giver == rank else dist.irecv,
            part,
            group=group,
            group_peer=each.taker if each.giver == rank else each.giver,
        )
        for each, part in zip(own, parts, strict=True)
    ]
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    sums = dict(zip(own, [get_fingerprint(part) for part in parts], strict=True))
    told = gather_values(_SUMS, [sums.get(each, 0) for each in stretches], votes)
    fits = {each: told[each.giver][i] == told[each.taker][i] for i, each in enumerate(stretches)}
    rows = [
        _get_rows(offers[each.giver], each, part)
        for each, part in zip(own, parts, strict=True)
        if each.taker == rank and fits[each]
    ]
    return TakenOver(rows, is_whole=all(fits.values()))


def get_room_bytes(device: torch.device) -> int:
    """Return how much a device can take over beside what is on it."""
    if device.type != "cuda":
        return 2**62
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, torch.cuda.mem_get_info(device)[0] + cached - _SPARE_BYTES)


def get_fingerprint(part: Tensor) -> int:
    """Return a number that differs for other bytes, or for the same in another order of MiB."""
    sums = sum_blocks(part)
    return int((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())


def list_chunks(entries: Mapping[str, Entry], places: Mapping[str, int]) -> list[Chunk]:
    """Return the chunks of a copy, in the order in which they lie there."""
    return [
        Chunk(name=name, offset=entries[name].offset, start=start, num_bytes=entries[name].num_bytes)
        for name, start in sorted(places.items(), key=itemgetter(1))
    ]


def _get_part(stretch: Stretch, memory: Tensor | None, rank: int, device: torch.device) -> Tensor:
    if stretch.giver == rank:
        assert memory is not None, "this rank has offered it"
        return memory[stretch.start : stretch.stop]
    return torch.empty(stretch.stop - stretch.start, dtype=torch.uint8, device=device)


def _get_rows(offer: Offer, stretch: Stretch, part: Tensor) -> Rows:
    chunks: dict[str, tuple[int, Tensor]] = {}
    for chunk in offer.chunks:
        start = chunk.start - stretch.start
        if stretch.start <= chunk.start < stretch.stop:
            chunks[chunk.name] = (chunk.offset, part[start : start + chunk.num_bytes])
    return Rows(offer.file, chunks)
