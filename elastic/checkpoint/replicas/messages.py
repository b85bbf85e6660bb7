"""What is said to a replica server and what it answers: each message is parsed once, where it enters. No torch here.

The one that has started a replica server leads it; trainers of its node and, over the network, trainers and replica
servers of other nodes ask it. An `id` comes back with the answer.
"""

from base64 import b64decode, b64encode
from dataclasses import dataclass, replace

import numpy as np

from elastic.checkpoint.replicas.inventory import Part, ReplicaInfo, Snapshot
from elastic.transport import Vocabulary, WireError

# ---- from and to the process that has started it


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a replica server must know to start; its first message, so that the secret is in no process list."""

    node: str
    owner_pid: int
    ip: str
    """Where other nodes reach it; empty: nowhere."""
    secret: str
    disk: str = ""
    """Folder of this run on a disk of the node's own; empty: snapshots are in memory only."""
    port: int = 0
    """Where other nodes look for it, unless that is taken; 0: any."""
    folder: str = ""
    """Where the trainers of this node can connect to it by themselves; empty: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Adopt:
    """Serve one more trainer; its connection comes with this."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Trainers of this node and other nodes are served."""

    port: int
    """Where other nodes reach it; 0: nowhere."""


# ---- from trainers of its node


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Hold a buffer of this trainer too; its descriptor comes with this."""

    origin: str
    index: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """Let go of a buffer that will not be filled again."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A buffer is about to be filled: what it held is void."""

    index: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A buffer is filled; `Settled` says when its checksums are known."""

    id: int
    index: int
    snapshot: Snapshot
    num_bytes: int
    chunks: tuple[Part, ...]
    record: object


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Copy what a buffer was filled with to the replica server at an address; `Settled` says when the copy counts."""

    id: int
    index: int
    snapshot: Snapshot
    peer: tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class HaltCopies:
    """Give up the copy under way."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Write the shards of a state that are here to the disk; `Settled` says when they are there."""

    id: int
    generation: int
    step: int
    complete: tuple[int, int] | None
    """Generation and step of a state that is on the disks of all nodes."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """Give the descriptor of a shard: `Mapped`, or `Missing`."""

    id: int
    origin: str
    index: int
    snapshot: Snapshot


# ---- from any process that knows the secret


@dataclass(frozen=True, kw_only=True)
class ListReplicas:
    """Say what is here: `Listed`."""

    id: int = 0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Say how much memory is held: `Measured`."""

    id: int
    waits: bool
    """Until all is free that was let go of."""


@dataclass(frozen=True, kw_only=True)
class Retire:
    """Free the snapshots of earlier attempts, all but those of one step."""

    before_generation: int
    keep_step: int | None


@dataclass(frozen=True, kw_only=True)
class Read:
    """Send bytes of a shard: `Data`, and then `Sum` if that is asked for; or `Missing`."""

    origin: str
    index: int
    snapshot: Snapshot
    start: int
    size: int
    sums: bool


@dataclass(frozen=True, kw_only=True)
class Push:
    """A copy will come: `Opened`, or `Refused` before a byte was sent."""

    shard: ReplicaInfo
    capacity: int
    """Bytes that its place must have room for."""


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """Some chunks in a row of a copy, whose bytes follow: `Taken`."""

    origin: str
    index: int
    ticket: int
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The checksums of a copy that has come whole: `Pushed` if they fit, `Refused` if not."""

    origin: str
    index: int
    ticket: int
    checksums: tuple[int, ...]


# ---- answers


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What was asked for is done, or failed."""

    id: int
    problem: str
    """Empty: there is none."""


@dataclass(frozen=True, kw_only=True)
class ListedReplica:
    """A shard in a list. A state of many GiB has tens of thousands of chunks, and every recovery waits for its list."""

    info: ReplicaInfo
    """Without chunks and checksums."""
    header_bytes: int
    """The first chunk; the others follow from `ReplicaInfo.record`."""
    checksums: str | None
    """Base64 of little-endian 32-bit numbers."""

    @classmethod
    def pack(cls, info: ReplicaInfo) -> "ListedReplica":
        """Return what is sent of a shard."""
        sums = info.checksums
        return cls(
            info=replace(info, chunks=(), checksums=None),
            header_bytes=info.chunks[0][1] if info.chunks else 0,
            checksums=None if sums is None else b64encode(np.array(sums, dtype="<u4").tobytes()).decode(),
        )

    def unpack(self) -> ReplicaInfo:
        """Return the shard, with its first chunk alone.

        Raises:
            WireError: these are no checksums.
        """
        sums: tuple[int, ...] | None = None
        if self.checksums is not None:
            try:
                sums = tuple(np.frombuffer(b64decode(self.checksums, validate=True), dtype="<u4").tolist())
            except ValueError as error:
                raise WireError(f"a list of shards is none of ours: {error}") from error
        return replace(self.info, chunks=((0, self.header_bytes),), checksums=sums)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The shards that are here; of those that were filled just now the checksums are not known yet."""

    id: int
    replicas: tuple[ListedReplica, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of memory that are held."""

    id: int
    held_bytes: int
    left_bytes: int
    """By trainers that are gone."""
    copy_bytes: int


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """A shard's descriptor comes with this."""

    id: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Missing:
    """The shard is not here."""

    id: int = 0


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The copy may come."""

    ticket: int
    """Tells its stripes from those of a copy that was given up."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A stripe has come whole."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The copy counts."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The copy does not count."""

    problem: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """The bytes that were asked for follow."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The checksum of the bytes that were sent."""

    crc32: int


FromOwner = Start | Adopt
FromAnyone = ListReplicas | Measure | Retire | Read | Push | Stripe | Seal
FromTrainer = Hold | Release | Begin | Fill | Copy | HaltCopies | Store | Map | FromAnyone
Answer = Settled | Listed | Measured | Mapped | Missing
CopyAnswer = Opened | Taken | Pushed | Refused
RemoteAnswer = Listed | Missing | Data | Sum

FROM_OWNER = Vocabulary[FromOwner](Start, Adopt)
TO_OWNER = Vocabulary[Ready](Ready)
FROM_ANYONE = Vocabulary[FromAnyone](ListReplicas, Measure, Retire, Read, Push, Stripe, Seal)
FROM_TRAINER = Vocabulary[FromTrainer](
    *(Hold, Release, Begin, Fill, Copy, HaltCopies, Store, Map),
    *(ListReplicas, Measure, Retire, Read, Push, Stripe, Seal),
)
ANSWERS = Vocabulary[Answer](Settled, Listed, Measured, Mapped, Missing)
COPY_ANSWERS = Vocabulary[CopyAnswer](Opened, Taken, Pushed, Refused)
REMOTE_ANSWERS = Vocabulary[RemoteAnswer](Listed, Missing, Data, Sum)
