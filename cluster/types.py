"""Plain data that the parts of the cluster side exchange: places, and the controller's events and actions.

What a host sees, and what a host or its trainers must do, also crosses the network as it is (`runtime.messages`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from elastic.ports import Progress, Where

RAY_HEAD_ENV: Mapping[str, str] = {"RAY_health_check_period_ms": "1000"}
"""What every head of ours is started with: it asks a silent node five times before it calls it dead, by default every
three seconds, and what Ray still takes for alive is paid for and waited for."""

_LEAVE_S, _LEAVE_GPUS_S = 2.0, 4.0


def get_leave_limit_s(*, uses_gpus: bool) -> float:
    """Return how long a trainer that was asked to leave its world may take; after that it is killed.

    Without GPUs half a second is long. To abort NCCL's communicators took 0.4 to 1.2 s on H100s, before which a step
    that is under way has to end; a survivor that is killed too soon costs 5 s more than one that is waited for.
    """
    return _LEAVE_GPUS_S if uses_gpus else _LEAVE_S


DRIVER_GONE = "its driver is gone"
"""Why a coordinator ends a run that nobody watches any more; `attempts.jsonl` says it, and the next driver reads it."""

OutcomeKind = Literal["finished", "interrupted", "lost", "failed"]
TrainerOutcome = Literal["finished", "interrupted", "lost", "failed", "crashed", "killed"]
Change = Literal[
    "finished",
    "failed",
    "stopped",
    "node_added",
    "node_drained",
    "node_lost",
    "trainer_lost",
    "trainer_stalled",
    "coordinator_lost",
    "driver_lost",
    "head_lost",
]
"""What ended an attempt."""
_KINDS: dict[Change, OutcomeKind] = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "interrupted",
    "node_added": "interrupted",
    "node_drained": "interrupted",
    "node_lost": "lost",
    "trainer_lost": "lost",
    "trainer_stalled": "lost",
    "coordinator_lost": "lost",
    "driver_lost": "interrupted",
    "head_lost": "lost",
}


@dataclass(frozen=True, order=True)
class Slot:
    """A place for one trainer: a GPU of a node (or, without GPUs, a share of its cores)."""

    node: str
    name: str


# ---- events: what the coordinator has seen


@dataclass(frozen=True, kw_only=True)
class HostGone:
    """A node's host, and with it every trainer of the node, is no more."""

    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """An agent took a slot, and its trainer could join a world.

    `group` counts Ray's worker groups, `group_size` is how many agents that group has.
    """

    slot: Slot
    group: int
    group_size: int
    agent_pid: int = 0
    """0: not known."""


@dataclass(frozen=True, kw_only=True)
class Expired:
    """Nobody held a slot, and nobody renewed its lease; the host ended its trainer."""

    slot: Slot


@dataclass(frozen=True, kw_only=True)
class Draining:
    """A node will go away; said again with another deadline, that one counts."""

    node: str
    deadline_s: float | None
    reason: str
    source: str = "ray"
    """Who gave notice: a provider's name, or Ray itself."""


@dataclass(frozen=True, kw_only=True)
class Undrained:
    """A node's notice was withdrawn, and nothing keeps it from training."""

    node: str


@dataclass(frozen=True, kw_only=True)
class GenerationTaken:
    """The storage has given us the generation that the next attempt needs."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class TrainerReady:
    """A forked trainer has opened its store and waits for its world."""

    slot: Slot
    attempt: int
    store_host: str
    store_port: int


@dataclass(frozen=True, kw_only=True)
class TrainerEnded:
    """A trainer is in the world no more.

    `outcome` is what it said: of `lost` (a peer went, or we asked it to leave) and `interrupted` ones the process stays
    and can join the next world. `crashed` if it said nothing, `killed` if we asked for that.
    """

    slot: Slot
    attempt: int
    outcome: TrainerOutcome
    reason: str
    exit_code: int = 1
    """What the command line returns if this end is `failed`."""


@dataclass(frozen=True, kw_only=True)
class TrainerDying:
    """The kernel takes a trainer down that nobody has ended; `TrainerEnded` follows once it is gone."""

    slot: Slot
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Unkillable:
    """A trainer was killed, and its process is still there: the kernel does not let go of it (state D, mostly).

    No trainer of its slot can be in the world of this attempt.
    """

    slot: Slot
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """The world finished an optimizer step."""

    attempt: int
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """A trainer makes no progress for longer than it ever should: it says so, or (`silent`) its host does."""

    slot: Slot
    attempt: int
    step: int
    """The last one it finished."""
    where: Where


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Somebody wants the run to end now, resumable."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = (
    HostGone
    | Claimed
    | Expired
    | Draining
    | Undrained
    | GenerationTaken
    | TrainerReady
    | TrainerDying
    | TrainerEnded
    | Unkillable
    | Stepped
    | Stalled
    | Stop
    | Tick
)


# ---- actions: what the coordinator must do


@dataclass(frozen=True, kw_only=True)
class TakeGeneration:
    """Take the generation of the next attempt from the storage, which may take its time; `GenerationTaken` follows."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class Join:
    """Have a slot's trainer get ready for the next world."""

    slot: Slot
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Go:
    """Tell a waiting trainer its place in the world."""

    slot: Slot
    attempt: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store_host: str
    store_port: int


@dataclass(frozen=True, kw_only=True)
class Park:
    """Ask a trainer to save with all others at one agreed step and leave."""

    slot: Slot
    attempt: int
    reason: str
    deadline_s: float | None
    keep_in: Literal["memory", "storage"]
    """Where the state must be: in the memory of the nodes if others go on from there at once."""
    leaves: bool
    """It is not in the next world, as far as is known."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Have a trainer drop its world as it is, and wait for the next one."""

    slot: Slot
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Kill:
    """End a trainer at once."""

    slot: Slot
    attempt: int


@dataclass(frozen=True, kw_only=True)
class LeaveOut:
    """Know that a slot is in no world until the process in it has ended."""

    slot: Slot
    reason: str


@dataclass(frozen=True, kw_only=True)
class TakeBack:
    """Know that the process in a slot that was left out has ended: it may train again."""

    slot: Slot
    after_s: float


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Have a node drained: nothing on it can train."""

    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttemptStarted:
    """A world is formed; for the run records."""

    attempt: int
    members: tuple[Slot, ...]


@dataclass(frozen=True, kw_only=True)
class AttemptEnded:
    """A world is over; for the run records. `cause`: the node that left, was lost or lost a trainer, if certain."""

    attempt: int
    members: tuple[Slot, ...]
    change: Change
    reason: str
    cause: str | None
    noticed_s: float
    """When the change was announced, or the loss seen (Unix seconds)."""
    denied: str | None = None
    """The node that is left out from now on, because its trainers failed again and again."""

    @property
    def kind(self) -> OutcomeKind:
        """How `attempts.jsonl` calls this end."""
        return _KINDS[self.change]


@dataclass(frozen=True, kw_only=True)
class Done:
    """The run is over."""

    kind: OutcomeKind
    reason: str
    exit_code: int


Action = (
    TakeGeneration
    | Join
    | Go
    | Park
    | Leave
    | Kill
    | LeaveOut
    | TakeBack
    | GiveUp
    | AttemptStarted
    | AttemptEnded
    | Done
)


# ---- views


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A trainer at work, as the driver sees it."""

    rank: int
    node: str
    slot: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run as it is at this moment: who could be struck, and what would be interrupted."""

    stage: str
    """As `controller.Stage`."""
    attempt: int
    step: int
    """The highest that any attempt has applied."""
    attempt_step: int
    """The newest that the current attempt has applied; 0: none yet."""
    world_size: int
    """Of the current attempt."""
    workers: tuple[Worker, ...]
    """Trainers of the current attempt that have said who they are, by rank; those of a world that forms, too."""
    agents: Mapping[Slot, int]
    """Process id of the agent that claimed a slot last."""
    hosts: Mapping[str, int]
    """Process id of each node's host."""
