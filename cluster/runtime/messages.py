"""All that agent, host, trainer and coordinator say to each other (`elastic.transport` has the form it travels in)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.controller import Holder
from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.types import Claimed, Expired, Go, Join, Kill, Leave, Park, Slot, TrainerDying, TrainerEnded, Unkillable
from elastic.ports import Address, Phase, Progress, Source, Where
from elastic.transport import Vocabulary

MAX_TRAINER_BYTES = 4 * 2**20
"""Of what a trainer says; its host wraps it, and that must not be too long for the coordinator."""

Row = Mapping[str, object]
PhaseTimes = tuple[tuple[Phase, float, float], ...]
"""What time went into: phase, start and end (Unix seconds)."""


# ---- an agent, or who starts hosts, to the host of its node


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An agent wants a slot, for one of Ray's worker groups."""

    group: int
    group_size: int
    pid: int
    slot: str
    """Empty: any."""
    env: Mapping[str, str]
    """For its trainers."""


@dataclass(frozen=True, kw_only=True)
class CoordinatorMoved:
    """This is where the coordinator is."""

    address: CoordinatorAddress


@dataclass(frozen=True, kw_only=True)
class Abandoned:
    """The run has other hosts by now."""


TO_HOST_FROM_NODE = Vocabulary[Claim | CoordinatorMoved | Abandoned](Claim, CoordinatorMoved, Abandoned)


# ---- a host to an agent


@dataclass(frozen=True, kw_only=True)
class ClaimGranted:
    """The slot is the agent's."""

    slot: str
    trainer_pid: int | None
    log: str
    """Path of the log of its trainers."""


@dataclass(frozen=True, kw_only=True)
class Fenced:
    """An agent of a newer group has the slot."""

    by: int


@dataclass(frozen=True, kw_only=True)
class Exited:
    """The trainer of the slot ended."""

    pid: int
    code: int
    attempt: int | None


@dataclass(frozen=True, kw_only=True)
class Bye:
    """The host ends."""

    reason: str


TO_AGENT = Vocabulary[ClaimGranted | Fenced | Exited | Bye](ClaimGranted, Fenced, Exited, Bye)


# ---- a trainer to its host


@dataclass(frozen=True, kw_only=True)
class Warm:
    """It could join a world."""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """It runs."""


@dataclass(frozen=True, kw_only=True)
class WorldLeft:
    """Its part in the world is over."""

    outcome: Literal["finished", "interrupted", "lost", "failed", "crashed"]
    reason: str
    exit_code: int
    stays: bool
    """It can join the next world."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """It waits for its place in the world."""

    store_host: str
    store_port: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class Phases:
    """What time went into before the next step is done."""

    phases: PhaseTimes


@dataclass(frozen=True, kw_only=True)
class Restored:
    """It has the state that the attempt starts from."""

    progress: Progress
    source: Source


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """It finished a step; said by rank 0."""

    progress: Progress
    row: Row
    phases: PhaseTimes
    """Since the last one."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What time went into up to the end of a step, since the one before."""

    step: int
    phases: PhaseTimes


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """It finished these steps, as all ranks did; said now and then by those that do not write the rows."""

    num_steps: int
    """In this world, up to now."""
    step: int
    """The last one."""
    times: tuple[StepTimes, ...]
    """Of the first rank of a node; the node's others did the same. Empty: for the host alone."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint became visible."""

    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A snapshot is whole in the memory of the nodes."""

    progress: Progress
    copied: bool
    """No node alone has any part of it."""


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """It makes no progress, or (`silent`) its host hears nothing of it."""

    step: int
    where: Where
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class RowWritten:
    """A row for a file of the run that only the coordinator writes."""

    attempt: int
    file: str
    number: int
    """From 1, in this file and attempt."""
    row: Row


@dataclass(frozen=True, kw_only=True)
class RowsAsked:
    """It wants to know which of its rows are in the storage."""

    ask: int
    streams: tuple[tuple[int, str], ...]
    """Attempt and file."""


TrainerMessage = Ready | Phases | Restored | Stepped | Progressed | Committed | Kept | Stalled | RowWritten | RowsAsked
"""What the coordinator is told."""
FROM_TRAINER = Vocabulary[Warm | Alive | WorldLeft | TrainerMessage](
    Warm,
    Alive,
    WorldLeft,
    Ready,
    Phases,
    Restored,
    Stepped,
    Progressed,
    Committed,
    Kept,
    Stalled,
    RowWritten,
    RowsAsked,
)


# ---- a host to the coordinator


@dataclass(frozen=True, kw_only=True)
class HostHello:
    """The first message: who comes."""

    node: str
    pid: int
    replica_server: Address | None
    """Where the memory of the node is served."""


@dataclass(frozen=True, kw_only=True)
class ReplicaServerMoved:
    """The memory of the node is served by another process."""

    address: Address | None


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life, and whose agents hold the slots."""

    holders: Mapping[str, Holder | None]


@dataclass(frozen=True, kw_only=True)
class TrainerSaid:
    """What a trainer says, or is said of one that says nothing."""

    slot: Slot
    attempt: int | None
    message: TrainerMessage


HostMessage = ReplicaServerMoved | Beat | Claimed | Expired | TrainerDying | TrainerEnded | Unkillable | TrainerSaid
"""Of what it says itself most are events of the controller."""
FROM_HOST = Vocabulary[HostHello | HostMessage](
    HostHello, ReplicaServerMoved, Beat, Claimed, Expired, TrainerDying, TrainerEnded, Unkillable, TrainerSaid
)


# ---- the coordinator to a host, which passes what is for a trainer on to it


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The host is led from now on."""


@dataclass(frozen=True, kw_only=True)
class Renew:
    """Keep these slots."""

    slots: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class End:
    """End the host."""

    reason: str
    forget: bool
    """Nobody will go on from what lies on the disk of the node."""


@dataclass(frozen=True, kw_only=True)
class ReplicaServersTold:
    """The trainers of the node find the memories of all nodes there; told before they go, once for all of them."""

    attempt: int
    replica_servers: Mapping[str, Address]
    """Where the memories of the nodes are served."""
    peer: Address | None
    """The one that gets copies of this node's."""
    mean_s_between_losses: float


@dataclass(frozen=True, kw_only=True)
class RowsKept:
    """The answer to `RowsAsked`."""

    slot: Slot
    attempt: int
    ask: int
    kept: tuple[tuple[int, str, int], ...]
    """Attempt, file, and how many of its rows are in the storage."""
    problem: str
    """Why they are not; empty if they are."""


Order = Join | ReplicaServersTold | Go | Park | Leave | RowsKept
"""What a trainer hears; most are actions of the controller."""
TO_TRAINER = Vocabulary[Order](Join, ReplicaServersTold, Go, Park, Leave, RowsKept)
CoordinatorMessage = Welcome | Renew | End | Kill | Order
TO_HOST = Vocabulary[CoordinatorMessage](Welcome, Renew, End, ReplicaServersTold, Kill, Join, Go, Park, Leave, RowsKept)
