"""How ranks agree on what is done without waiting for each other, over a gloo group of their own."""

from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.checkpoint.exchange import new_group


class Votes:
    """One vote at a time: what all ranks ask at one step, they count at a later one, when the answer is long there.

    All methods but `close` are called by all ranks at the same step.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._group = new_group(timeout)
        self._open: tuple[Tensor, dist.Work] | None = None

    def open(self, values: Sequence[float]) -> None:
        """Ask; of each value the least that any rank has will count."""
        ballot = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(ballot, dist.ReduceOp.MIN, self._group, async_op=True)
        self._open = ballot, cast(dist.Work, work)

    def count(self) -> list[float] | None:
        """Return the outcome of the vote that is open; None if there is none."""
        if self._open is None:
            return None
        (ballot, work), self._open = self._open, None
        work.wait()
        return ballot.tolist()

    def agree(self, value: float) -> float:
        """Return the least value of all ranks, now."""
        assert self._open is None, "a vote is open"
        self.open([value])
        outcome = self.count()
        assert outcome is not None
        return outcome[0]

    def close(self) -> None:
        """Forget what is open. Works with dead peers."""
        self._open = None
        dist.destroy_process_group(self._group)
