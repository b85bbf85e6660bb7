"""What the outside implements for a trainer, and the plain data that crosses the border.

`elastic` trains on the ranks it is given. Who gives them (torchrun, or Solvent's own coordinator), who
warns of a preemption and who watches the progress is hidden behind the Protocols of this file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, Protocol

from elastic.constraints import NOT_NEGATIVE

Phase = Literal["start", "train", "redo", "save", "load", "reconfigure", "wait", "data", "eval", "idle"]
"""What a paid node does; the states of `ledger.jsonl`."""

Source = Literal["scratch", "memory", "peer", "disk", "remote"]
"""Where the state of an attempt came from."""


Where = Literal[
    "silent",
    "in a collective",
    "waiting",
    "saving",
    "loading data",
    "loading a checkpoint",
    "writing its rows",
    "computing",
]
"""What a trainer without progress does. `waiting`: for its device or its backward, and so maybe for a peer.
`silent`: not even its threads run, so others say it."""


Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A phase that takes far longer than it should."""

    phase: Phase
    where: Where
    waited_s: float
    """Since the last progress."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training has come: global batches consumed, and target tokens of those that were not bad.

    A step that was bad counts, because its samples are not used again, but its tokens do not: they move the learning
    rate, and nothing was learned from them.
    """

    step: Annotated[int, NOT_NEGATIVE] = 0
    tokens: Annotated[int, NOT_NEGATIVE] = 0


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """Which tokens, and whose tokens, a run trains on, wherever their folder lies; from its `dataset.json`."""

    tokenizer_sha256: str
    train_sha256: str = ""
    """Of the hashes of the shards, in their order. Empty: not known, the run has a tokenizer and no data yet."""
    val_sha256: str = ""
    train_tokens: int = 0
    val_tokens: int = 0
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of a mixture: the name, as below, of each source's own identity. All else is then over all of them."""

    @property
    def name(self) -> str:
        """Return 16 hexadecimal digits that change with any of it."""
        fields = asdict(self)
        if not self.sources:
            del fields["sources"]  # older versions knew none
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """One rank's place in one world. `attempt` numbers worlds over the life of a run, from 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    attempt: int
    store_host: str
    store_port: int
    node: str = "local"
    replica_servers: Mapping[str, Address] = field(default_factory=dict[str, Address])
    """Where the memory of each living node is served, by node; the last world's members among them."""
    peer: Address | None = None
    """The replica server that shall have copies of this node's snapshots."""
    mean_s_between_losses: float = 3600.0
    """Expected seconds until the next loss, for intervals that are planned."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The wish that this rank leaves: a preemption with its deadline, or a planned change (no deadline)."""

    source: str
    deadline_s: float | None = None
    """Unix time at which the node is gone."""
    keep_in: Literal["memory", "storage"] = "storage"
    """Where the state must be safe before the ranks leave: others go on at once from their memory, or nobody does."""
    leaves: bool = False
    """This rank is not in the next world, as far as is known."""


class NoticeSource(Protocol):
    """Tells a trainer that it should leave soon."""

    def get_notice(self) -> Notice | None:
        """Return the pending notice at once, without any I/O."""
        ...


class MetricSink(Protocol):
    """Takes one row per optimizer step (the columns of `metrics.jsonl`)."""

    def write(self, row: Mapping[str, object]) -> None:
        """Take one row; must not raise for a fault of the sink's own back end."""
        ...

    def close(self) -> None:
        """Flush what is left."""
        ...


class Observer(Protocol):
    """Watches one trainer; never changes training."""

    def phase(self, phase: Phase, start_s: float, end_s: float) -> None:
        """Take one finished stretch of time (Unix seconds); stretches of one trainer never overlap."""
        ...

    def restored(self, progress: Progress, source: Source) -> None:
        """Take the state this attempt starts from, before its first step."""
        ...

    def stepped(self, progress: Progress, row: Mapping[str, object]) -> None:
        """Take a finished optimizer step and its row (the row is complete on rank 0 only)."""
        ...

    def committed(self, progress: Progress) -> None:
        """Take a checkpoint that became visible (rank 0 only)."""
        ...

    def kept(self, progress: Progress, *, copied: bool) -> None:
        """Take a state that is whole in the memory of the nodes; `copied`: no node alone has any part (rank 0 only)."""
        ...

    def alive(self) -> None:
        """Take a sign that this process runs; given every second by a thread of its own."""
        ...

    def stalled(self, stall: Stall) -> None:
        """Take the lack of progress, twice a second while it lasts; called by the thread that gives signs of life."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finished:
    """All steps are done and the last state is committed."""

    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """All ranks left together, for a reason that is not a mistake."""

    progress: Progress
    reason: str


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A peer went away; nothing after the newest committed checkpoint survives in this process."""

    progress: Progress
    reason: str


Outcome = Finished | Interrupted | Lost
