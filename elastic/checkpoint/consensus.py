"""What all ranks agree on, step by step and without waiting for each other, over a gloo group of their own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.checkpoint.exchange import new_group


@dataclass(frozen=True, kw_only=True)
class Job:
    """How a job stands of which every rank does its part; a rank without a part holds up no other."""

    is_over: bool = True
    """It is done, or it failed."""
    is_done: bool = True


@dataclass(frozen=True, kw_only=True)
class TierBallot:
    """What a rank says of its snapshots beyond the memory of its own node."""

    copy: Job = Job()
    """Of its part, on another node."""
    disk_write: Job = Job()
    is_disk_write_due: bool = False


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """What one rank says at one step, and what comes out for all: a yes only if all say yes, the largest number."""

    memory_save: Job = Job()
    """A state that goes to memory only has got there."""
    storage_save: Job = Job()
    """A state that goes to the storage has got to memory, on its way."""
    is_written: bool = True
    """It has got to the storage, or failed."""
    has_left_device: bool = True
    """No save needs the device any more."""
    tiers: TierBallot = TierBallot()
    memory_every_steps: int = 1
    """After so many steps this rank would save to memory again,"""
    storage_every_steps: int = 1
    """and to the storage."""


class Votes:
    """One vote at a time: what all ranks ask at one step, they count at a later one, when the answer is long there.

    All methods but `close` are called by all ranks at the same step.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._group = new_group(timeout)
        self._open: tuple[Tensor, dist.Work] | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks; unused while no vote is open."""
        return self._group

    def open(self, ballot: Ballot) -> None:
        """Ask."""
        self._start(pack(ballot))

    def count(self) -> Ballot | None:
        """Return the outcome of the vote that is open; None if there is none."""
        values = self._wait()
        return None if values is None else unpack(values)

    def agree(self, is_well: bool) -> bool:
        """Return whether all ranks say so, now."""
        assert self._open is None, "a vote is open"
        self._start([is_well])
        values = self._wait()
        assert values is not None
        return bool(values[0])

    def close(self) -> None:
        """Forget what is open. Works with dead peers."""
        self._open = None
        dist.destroy_process_group(self._group)

    def _start(self, values: list[float]) -> None:
        table = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(table, dist.ReduceOp.MIN, self._group, async_op=True)
        self._open = table, cast(dist.Work, work)

    def _wait(self) -> list[float] | None:
        if self._open is None:
            return None
        (table, work), self._open = self._open, None
        work.wait()
        return table.tolist()


def pack(ballot: Ballot) -> list[float]:
    """Return a ballot as numbers of which the least of all ranks counts."""
    return list(_flatten(ballot))


def unpack(values: Sequence[float]) -> Ballot:
    """Return what `pack` has packed."""
    return _rebuild(Ballot, iter(values))


def _flatten(ballot: Any) -> Iterator[float]:
    for field in fields(ballot):
        value = getattr(ballot, field.name)
        if is_dataclass(value):
            yield from _flatten(value)
        else:
            yield float(value) if isinstance(value, bool) else -float(value)


def _rebuild(kind: type[Any], values: Iterator[float]) -> Any:
    def take(default: object) -> object:  # the defaults say what each field is
        if is_dataclass(default):
            return _rebuild(type(default), values)
        return bool(next(values)) if isinstance(default, bool) else int(-next(values))

    return kind(**{field.name: take(field.default) for field in fields(kind)})
