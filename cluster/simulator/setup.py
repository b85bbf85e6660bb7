"""What is simulated, and what came of it: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.ledger import LedgerRow
from cluster.simulator.saving import Saving


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated."""

    saving: Saving
    world_sizes: tuple[int, ...]
    usd_per_node_hour: float = 1.0
    step_node_s: float = 60.0
    """Node-seconds of work in a step: on 16 nodes it takes 3.75 s."""
    notice_s: float = 0.0
    """Before each loss; 0: none."""
    growth_patience: float = 5.0
    start_s: float = 0.0
    """Until a new node can train."""
    work_node_s: float = float("inf")
    """The run is finished after so much."""
    rates: Mapping[int, float] = field(default_factory=dict[int, float])
    """Node-seconds of work that a world of so many nodes does in a second; else as many as it has nodes."""

    def get_rate(self, size: int) -> float:
        """Return how fast a world works."""
        return self.rates.get(size, float(size))


@dataclass(kw_only=True)
class Tally:
    """What came of it."""

    useful_node_s: float = 0.0
    """Work that lasts."""
    redone_node_s: float = 0.0
    member_node_s: float = 0.0
    """Of nodes while they were in a world, or between two."""
    paid_node_s: float = 0.0
    world_s: float = 0.0
    """Time in which there was a world."""
    training_s: float = 0.0
    """Time in which there was a world that trained."""
    losses: int = 0
    changes: int = 0
    usd: float = 0.0
    end_s: float = 0.0
    finished_s: float | None = None
    rows: list[LedgerRow] = field(default_factory=list[LedgerRow])
    sizes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """World sizes over time; 0: none."""
    work: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Lasting work over time, in node-seconds."""
