"""What the next saves of a rank take, and what a loss would cost now: for decisions and rows, not for saves."""

import statistics
from collections.abc import Callable

from elastic.checkpoint.bandwidth import Rates
from elastic.checkpoint.protocol import SaveProtocol
from elastic.checkpoint.schedule import Tier
from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.staging.live_plan import LivePlan


class Forecast:
    """Of one rank of one world.

    Args:
        choose_last: returns the buffer that the last save of this world would take, if one is free.
        start_step: where this world began.
    """

    def __init__(
        self,
        protocol: SaveProtocol,
        *,
        plan: LivePlan,
        buffers: HostBuffers,
        choose_last: Callable[[], int | None],
        rates: Rates,
        start_step: int,
    ) -> None:
        self._protocol, self._plan, self._buffers = protocol, plan, buffers
        self._choose_last, self._rates, self._start_step = choose_last, rates, start_step

    def get_usual_s(self, tier: Tier) -> float | None:
        """Return the median seconds until a state was safe in a tier; None before the first.

        For the storage all ranks answer the same.
        """
        memory, storage = self._protocol.memory, self._protocol.storage
        took_s = storage.commit_s if tier == "storage" or memory is None else memory.safe_s
        return statistics.median(took_s) if took_s else None

    @property
    def is_snapshotting(self) -> bool:
        """Tell whether a state is on its way to memory, copies aside; the same on all ranks."""
        saves = self._protocol.saves
        return saves.on_device is not None or "memory" in saves

    def estimate_hand_over_s(self) -> float:
        """Return how long this rank needs to bring its part to where the next world finds it, begun now."""
        saves, index = self._protocol.saves, self._choose_last()
        is_found = index is None or self._buffers.is_found(index)
        way = self._rates.to_host if is_found else self._rates.to_new_host
        ahead = saves[saves.on_device].staged.buffer.nbytes if saves.on_device else 0
        return way.estimate_s(self._plan.own_bytes) + self._rates.to_host.estimate_s(ahead)

    def estimate_copy_s(self) -> float:
        """Return how long it takes to bring this rank's part from one node to another."""
        return self._rates.to_peer.estimate_s(self._plan.own_bytes)

    def get_unkept_steps(self, step: int) -> tuple[int, int] | None:
        """Return how many steps would be made again now if a trainer, and if a node were lost.

        None if no state is kept in memory.
        """
        memory, committed = self._protocol.memory, self._protocol.storage.committed
        if memory is None:
            return None
        newest, safe = [kept.progress.step if kept else self._start_step for kept in (memory.newest, memory.safe)]
        committed_step = committed.step if committed else self._start_step
        return step - max(newest, committed_step), step - max(safe, committed_step)
