"""What comes of a fleet under several policies, side by side. Pure."""

from dataclasses import dataclass, replace

from cluster.simulator.engine import simulate
from cluster.simulator.saving import Saving
from cluster.simulator.setup import Setup, Tally
from cluster.traces import Fleet, as_gang

_OURS_LEAVE_S, _OURS_S = 0.5, 2.0
"""Solvent's outage after a loss, in two parts. Measured on two H200, 1.5 B: 2.2 to 2.6 s in all (cluster/README.md)."""
_OURS_PARK_S, _OURS_PLANNED_S = 0.5, 1.0
"""The same where it was planned: 1.4 to 1.6 s in all."""
_OURS_UNSAVED_S = 3.0
"""As `elastic/checkpoint/schedule.py` takes snapshots in memory where they cost next to nothing."""
_OURS_UNSTORED_S = 120.0
"""What the storage lacks on average, where checkpoints are planned (checkpoint.every_steps=0); an estimate."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One policy on one fleet."""

    policy: str
    trace: str
    tally: Tally
    fleet_node_s: float
    step_node_s: float
    tokens_per_node_s: float

    @property
    def goodput(self) -> float:
        """Of the time of nodes that were in a world, what made progress that lasts."""
        return self.tally.useful_node_s / self.tally.member_node_s if self.tally.member_node_s else 0.0

    @property
    def fleet_share(self) -> float:
        """Of all node-seconds that were there, what made progress that lasts."""
        return self.tally.useful_node_s / self.fleet_node_s if self.fleet_node_s else 0.0

    @property
    def world_share(self) -> float:
        """Of the time, that in which there was a world."""
        return self.tally.world_s / self.tally.end_s if self.tally.end_s else 0.0

    @property
    def training_share(self) -> float:
        """Of the time, that in which there was a world that trained."""
        return self.tally.training_s / self.tally.end_s if self.tally.end_s else 0.0

    @property
    def usd_per_mtoken(self) -> float | None:
        """Dollars per million tokens that last; None without a speed."""
        tokens = self.tally.useful_node_s * self.tokens_per_node_s
        return self.tally.usd / tokens * 1e6 if tokens else None

    def to_row(self) -> dict[str, object]:
        """Return what `simulate --json` says."""
        return {
            "goodput": round(self.goodput, 5),
            "fleet_share": round(self.fleet_share, 5),
            "world_share": round(self.world_share, 5),
            "training_share": round(self.training_share, 5),
            "wall_h": round(self.tally.end_s / 3600, 4),
            "usd": round(self.tally.usd, 4),
            "usd_per_useful_node_hour": round(self.tally.usd / self.tally.useful_node_s * 3600, 5)
            if self.tally.useful_node_s
            else None,
            "usd_per_mtoken": self.usd_per_mtoken,
            "losses": self.tally.losses,
            "changes": self.tally.changes,
            "steps_redone": round(self.tally.redone_node_s / self.step_node_s, 1),
            "finished": self.tally.finished_s is not None,
        }


def build_savings(*, save_s: float, recovery_s: float) -> tuple[Saving, ...]:
    """Return the ways to save that are compared: three with these costs, and ours."""
    return (
        Saving(name="fixed-30min", kind="fixed", save_s=save_s, recovery_s=recovery_s),
        Saving(name="young", kind="young", save_s=save_s, recovery_s=recovery_s),
        Saving(name="jit", kind="jit", save_s=save_s, recovery_s=recovery_s),
        Saving(
            name="solvent",
            kind="memory",
            save_s=0.0,
            recovery_s=_OURS_S,
            planned_s=_OURS_PLANNED_S,
            leave_s=_OURS_LEAVE_S,
            park_s=_OURS_PARK_S,
            interval_s=_OURS_UNSAVED_S,
            durable_s=_OURS_UNSTORED_S,
        ),
    )


def compare(
    fleet: Fleet, setup: Setup, savings: tuple[Saving, ...], *, gang: int | None, tokens_per_node_s: float = 0.0
) -> list[Outcome]:
    """Return what comes of each way to save; of a gang as well, which takes so many nodes or none and saves as ours.

    A gang pays for its nodes while it has all of them.
    """
    plays = [(saving.name, fleet, replace(setup, saving=saving)) for saving in savings]
    if gang is not None:
        whole = replace(setup, saving=savings[-1], world_sizes=(gang,))
        plays.append((f"gang-{gang}", as_gang(fleet, gang), whole))
    return [
        Outcome(
            policy=name,
            trace=fleet.name,
            tally=simulate(played, chosen),
            fleet_node_s=fleet.node_hours * 3600,
            step_node_s=setup.step_node_s,
            tokens_per_node_s=tokens_per_node_s,
        )
        for name, played, chosen in plays
    ]
