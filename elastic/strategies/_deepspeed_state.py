"""Where DeepSpeed's ZeRO keeps weights and moments, and how they get from there into rows of DTensors and back.

ZeRO cuts a flat row of all elements (stages 1 and 2: of all parameters of a group, stage 3: of each parameter) into
equal parts, and checkpoints know whole rows of each tensor (`elastic/checkpoint/format/sharding.py`). Each rank sends
what another one holds in the other form, as one message per pair of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What there is of each parameter."""


class Range(NamedTuple):
    """Elements of a parameter's flat row that one rank holds."""

    start: int
    stop: int


class Overlap(NamedTuple):
    """Elements that one rank has in the one form and another one in the other; offsets in what each of them holds."""

    param: int
    flat_offset: int
    row_offset: int
    num_elements: int


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter as ZeRO holds it, sharing its memory: one flat tensor per kind."""

    range: Range
    tensors: tuple[Tensor, ...]


def find_parts(params: Sequence[nn.Parameter], zero: Any, *, stage: int) -> list[Part]:
    """Return what this rank holds of each parameter.

    Args:
        zero: DeepSpeed's optimizer; its states are there.
    """
    return [(_find_part_of_stage_3 if stage == 3 else _find_part)(param, zero) for param in params]


def _find_part_of_stage_3(param: Any, zero: Any) -> Part:
    weight = zero.get_local_fp32_param(param)
    start = min(dist.get_rank() * weight.numel(), param.ds_numel)  # the last part is padded
    stop = min(start + weight.numel(), param.ds_numel)
    moments = (zero.get_local_fp32_param(param, kind) for kind in KINDS[1:])
    return Part(Range(start, stop), tuple(tensor.data[: stop - start] for tensor in (weight, *moments)))


def _find_part(param: Any, zero: Any) -> Part:
    mapping = param._hp_mapping
    if mapping is None:  # others hold all of it
        return Part(Range(0, 0), tuple(torch.empty(0) for _ in KINDS))
    partition = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    place, address = mapping.hp_fragment_address, mapping.lp_fragment_address
    state = zero.optimizer.state[partition]
    tensors = (partition, *(state[kind] for kind in KINDS[1:]))
    return Part(
        Range(address.start, address.start + address.numel),
        tuple(tensor.data.narrow(0, place.start, place.numel) for tensor in tensors),
    )


def get_rows(param: DTensor, rank: int, world_size: int) -> Range:
    """Return the elements that FSDP2 gives to a rank: rows are cut as `torch.chunk` cuts them."""
    num_rows, row_elements = param.shape[0], param.numel() // param.shape[0]
    rows = -(-num_rows // world_size)
    start = min(rank * rows, num_rows)
    return Range(start * row_elements, min(start + rows, num_rows) * row_elements)


def find_overlaps(flat: Sequence[Range], rows: Sequence[Range]) -> list[Overlap]:
    """Return what two ranks have in common: one in flat parts, the other in rows, for every parameter."""
    found: list[Overlap] = []
    for number, (mine, theirs) in enumerate(zip(flat, rows, strict=True)):
        start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
        if start < stop:
            found.append(Overlap(number, start - mine.start, start - theirs.start, stop - start))
    return found


class Exchange:
    """Moves a state between DeepSpeed's parts and the rows of DTensors; all ranks call it together.

    Args:
        parts: this rank's, of each parameter.
        rows: the DTensors of each parameter: weight and moments, as in `KINDS`.
    """

    def __init__(self, parts: Sequence[Part], rows: Sequence[tuple[DTensor, ...]]) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._parts = [part.tensors for part in parts]
        self._rows = [tuple(tensor.to_local().detach().view(-1) for tensor in tensors) for tensors in rows]
        self._rank = rank
        ranges: list[list[Range]] = [[] for _ in range(world_size)]
        dist.all_gather_object(ranges, [part.range for part in parts])
        all_rows = [[get_rows(tensors[0], other, world_size) for tensors in rows] for other in range(world_size)]
        self._flat_here = [find_overlaps(ranges[rank], all_rows[other]) for other in range(world_size)]
        self._rows_here = [find_overlaps(ranges[other], all_rows[rank]) for other in range(world_size)]

    @torch.no_grad()
    def to_rows(self) -> None:
        """Write into the DTensors what DeepSpeed holds."""
        self._move(self._cut_flat, self._flat_here, self._cut_rows, self._rows_here)

    @torch.no_grad()
    def from_rows(self) -> None:
        """Write into DeepSpeed's parts what the DTensors hold."""
        self._move(self._cut_rows, self._rows_here, self._cut_flat, self._flat_here)

    def _cut_flat(self, overlap: Overlap) -> list[Tensor]:
        first = overlap.flat_offset
        return [tensor[first : first + overlap.num_elements] for tensor in self._parts[overlap.param]]

    def _cut_rows(self, overlap: Overlap) -> list[Tensor]:
        first = overlap.row_offset
        return [tensor[first : first + overlap.num_elements] for tensor in self._rows[overlap.param]]

    def _move(
        self,
        cut_sent: Callable[[Overlap], list[Tensor]],
        sent: Sequence[Sequence[Overlap]],
        cut_taken: Callable[[Overlap], list[Tensor]],
        taken: Sequence[Sequence[Overlap]],
    ) -> None:
        for mine, theirs in zip(sent[self._rank], taken[self._rank], strict=True):
            for source, target in zip(cut_sent(mine), cut_taken(theirs), strict=True):
                target.copy_(source)
        jobs: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, list[Tensor]]] = []
        for other in range(len(sent)):
            if other == self._rank:
                continue
            if sent[other]:
                message = torch.cat([piece for overlap in sent[other] for piece in cut_sent(overlap)])
                jobs.append(dist.P2POp(dist.isend, message, other))
            if taken[other]:
                targets = [piece for overlap in taken[other] for piece in cut_taken(overlap)]
                message = torch.cat([target.new_empty(target.shape) for target in targets])
                arriving.append((message, targets))
                jobs.append(dist.P2POp(dist.irecv, message, other))
        for job in dist.batch_isend_irecv(jobs) if jobs else ():
            job.wait()
        for message, targets in arriving:
            for target, piece in zip(targets, message.split([len(target) for target in targets]), strict=True):
                target.copy_(piece)
