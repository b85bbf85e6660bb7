"""The live tensors of one world and the plan of their saves, which are collected and made once."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.staging.write_plan import SavePlan, build_plan
from elastic.checkpoint.train_state import get_live_state


class LivePlan:
    """Makes the plan on a thread of its own, and finds room for it.

    Args:
        buffers: which must have room for this rank's shard.
        generation: number of the attempt.
    """

    def __init__(
        self, buffers: HostBuffers, *, device: torch.device, generation: int, rank: int, world_size: int
    ) -> None:
        self._buffers, self._device = buffers, device
        self._generation, self._rank, self._world_size = generation, rank, world_size
        self._live: dict[str, Tensor] = {}
        self._moments: list[Any] = []
        self._plan: Future[SavePlan] | None = None

    @property
    def is_begun(self) -> bool:
        """The plan is made, or is being made."""
        return self._plan is not None

    @property
    def own_bytes(self) -> int:
        """How much of the state this rank saves; 0 until that is known."""
        plan = self._plan
        return plan.result().own.num_bytes if plan and plan.done() and not plan.exception() else 0

    def begin(self, live: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Make the plan of a state that is all there."""
        self._live, self._moments = dict(live), _list_moments(optimizer)
        self._plan = self._start()

    def collect(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the live tensors; collecting them takes percents of a step, and updates leave them where they are."""
        if not self._live or not all(map(is_, _list_moments(optimizer), self._moments)):
            self._live, self._plan = get_live_state(model, optimizer), None
            self._moments = _list_moments(optimizer)
        return self._live

    def get(self) -> SavePlan:
        """Return the plan once it is made.

        Raises:
            CheckpointError: there is no room for a copy of the state.
        """
        if self._plan is None:
            self._plan = self._start()
        return self._plan.result()

    def wait(self) -> None:
        """Return when no plan is being made."""
        if self._plan is not None:
            wait([self._plan])

    def _start(self) -> Future[SavePlan]:
        planner = ThreadPoolExecutor(1, "plan")
        plan = planner.submit(self._make)
        planner.shutdown(wait=False)
        return plan

    def _make(self) -> SavePlan:
        """Cut the live state into shards, and make room for this rank's."""
        plan = build_plan(
            self._live, device=self._device, generation=self._generation, rank=self._rank, world_size=self._world_size
        )
        self._buffers.reserve(plan.own.num_bytes)
        return plan


def _list_moments(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for values in optimizer.state.values() for value in values.values()]
