"""Everything that the controller's decisions depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from cluster.controller.failures import Failures
from cluster.controller.stalls import Stalls
from cluster.controller.unkillable import LeftOut
from cluster.types import AttemptEnded, Done, Slot, TrainerReady, get_leave_limit_s
from elastic.ports import Phase

Stage = Literal["waiting", "forming", "running", "parking", "clearing", "done"]
MEMBER_PHASES: Mapping[Stage, Phase] = {
    "waiting": "wait",
    "forming": "reconfigure",
    "running": "load",
    "parking": "save",
    "clearing": "reconfigure",
    "done": "idle",
}
"""What a node of the world does when a stage begins."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers that the decisions hang on."""

    world_sizes: tuple[int, ...]
    """The numbers of workers that the run may train with, ascending (`RunConfig.get_world_sizes`)."""
    max_failures_without_progress: int
    max_node_failures: int = 3
    """A node is left out once so many worlds in a row fell to trainers of its own."""
    gather_s: float = 10.0
    """How long the first agents of a group wait for the others, in seconds."""
    form_s: float = 60.0
    """A world that has not formed within this is given up."""
    park_s: float = 120.0
    """A world that has not parked within this is killed; a nearer deadline of the notice wins."""
    leave_s: float = get_leave_limit_s(uses_gpus=False)
    """A trainer that was asked to leave its world, and has not after this, is killed."""
    kill_s: float = 8.0
    """A slot whose process has not ended so long after it was killed is left out. An exit that frees much memory takes
    seconds; with `leave_s` before it, the others train on within 15 s."""
    give_up_s: float = 60.0
    """A node is given up if none of its slots could train for so long because of such processes."""
    notice_window_s: float = 1.0
    """A notice waits so long for others: one provider takes nodes in batches, and one park can serve all of them."""
    leave_reserve_s: float = 10.0
    """No notice waits if less than this (or twice the slowest park so far) is left until its deadline."""
    growth_patience: float = 5.0
    """A world grows no sooner than this many times the usual outage after the last change: a change costs an outage,
    and so at most a sixth of the time goes into growing, however nodes come and go."""
    first_outage_s: float = 2.5
    """What a change is taken to cost before one was measured (README.md: 1.4 to 1.8 s in the demo)."""


class Blame(IntEnum):
    """How sure we are of the cause of a loss: peers of a dead trainer often report before its own host does."""

    NOBODY = 0
    A_PEER = 1
    TRAINER = 2
    NODE = 3


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A node is going to leave, as far as that is known."""

    heard_s: float
    deadline_s: float | None
    reason: str


@dataclass(kw_only=True)
class State:
    """What the events so far have come to; only `decide` changes it."""

    policy: Policy
    attempt: int = 0
    """The last attempt that was started, over the life of the run."""
    asked_generation: int | None = None
    """The generation that the storage was asked for last; it is that of the next attempt."""
    taken_generation: int | None = None
    """The last one that it gave us."""
    stage: Stage = "waiting"

    # ---- nodes
    claims: dict[Slot, int] = field(default_factory=dict[Slot, int])
    """Slots with a living host and a valid lease, and the group that claimed each last."""
    newest: set[Slot] = field(default_factory=set[Slot])
    """Those that the newest group has claimed."""
    usable: tuple[Slot, ...] | None = None
    """What `get_usable` has found; None once what that depends on has changed."""
    group: int = 0
    group_size: int = 0
    gather_until_s: float = 0.0
    draining: dict[str, Notice] = field(default_factory=dict[str, Notice])
    left_out: dict[Slot, LeftOut] = field(default_factory=dict[Slot, LeftOut])
    """Slots in which a process is that was killed and has not ended."""
    given_up: set[str] = field(default_factory=set[str])

    # ---- the current attempt
    members: tuple[Slot, ...] = ()
    """Slots of the current attempt, by rank."""
    alive: set[Slot] = field(default_factory=set[Slot])
    """Members whose trainer has not ended."""
    ready: dict[Slot, TrainerReady] = field(default_factory=dict[Slot, TrainerReady])
    stalls: Stalls = field(default_factory=Stalls)
    """What members that make no progress said last."""
    killed_s: dict[Slot, float] = field(default_factory=dict[Slot, float])
    """When members that shall leave the world were killed."""
    parking_since_s: float | None = None
    stage_until_s: float = 0.0
    park_deadline_s: float | None = None
    """The deadline that parking trainers were told."""
    ending: AttemptEnded | None = None
    """Why the current attempt ends, from the moment that is known."""
    blame: Blame = Blame.NOBODY
    """Who took the current attempt down; a better founded suspicion replaces a weaker one."""
    progressed: bool = False
    """The current attempt has finished a step that none had before."""
    first_step_s: float | None = None
    """When the current attempt finished its first step."""
    started_s: float = 0.0
    leaving_s: float | None = None
    """What the last world took to end once that was decided: a part of the outage. None before the first change."""

    # ---- what was learned
    failures: Failures = field(default_factory=Failures)
    outages_s: tuple[float, ...] = ()
    """What the newest changes cost, from being noticed to the first step after; waiting for nodes does not count."""
    slowest_park_s: float | None = None
    stop: Done | None = None
    """The run ends with this as soon as the trainers are gone."""

    _ranks_of: tuple[Slot, ...] = ()
    _ranks: dict[Slot, int] = field(default_factory=dict[Slot, int])
    _member_nodes: frozenset[str] = frozenset()

    @property
    def ranks(self) -> Mapping[Slot, int]:
        """The rank of each member."""
        self._look_at_members()
        return self._ranks

    @property
    def member_nodes(self) -> frozenset[str]:
        """The nodes of the members."""
        self._look_at_members()
        return self._member_nodes

    def _look_at_members(self) -> None:
        """Find out once what would otherwise be asked of thousands of members with each of their messages."""
        if self._ranks_of is not self.members:
            self._ranks_of = self.members
            self._ranks = {slot: rank for rank, slot in enumerate(self.members)}
            self._member_nodes = frozenset(slot.node for slot in self.members)
