"""Another node's replica server, for recovery: what it holds, and shards read from there. No torch here."""

import errno
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.replicas.inventory import ReplicaInfo
from elastic.checkpoint.replicas.messages import (
    REMOTE_ANSWERS,
    Data,
    FromAnyone,
    Listed,
    ListReplicas,
    Read,
    RemoteAnswer,
    Retire,
    Sum,
)
from elastic.transport import Channel, WireError, connect

_READ_TIMEOUT_S = 30.0

_A = TypeVar("_A", Listed, Data, Sum)


class RemoteReplicaServer:
    """A connection to another node's replica server. One thread at a time.

    Raises:
        WireError: by every method, if the replica server is gone or does not know the secret.
    """

    def __init__(self, address: tuple[str, int], secret: str, *, timeout_s: float) -> None:
        self._channel = Channel[RemoteAnswer](
            connect(address, secret, purpose="replicas", timeout_s=timeout_s), REMOTE_ANSWERS
        )
        self._channel.set_timeout(timeout_s)

    def fetch_list(self) -> list[ReplicaInfo]:
        """Return what the replica server has in memory, of the chunks the first alone."""
        return [listed.unpack() for listed in self._ask(ListReplicas(), Listed).replicas]

    def read_into(self, replica: ReplicaInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a replica from `start`.

        Where no checksums are known yet, the replica server takes one of what it sends: what was damaged on the way is
        noticed.
        """
        sums = replica.checksums is None
        message = Read(
            origin=replica.origin, index=replica.index, snapshot=replica.snapshot, start=start, size=len(out), sums=sums
        )
        self._ask(message, Data)
        self._channel.receive_into(out)
        if sums and crc32(out) != self._take(Sum).crc32:
            raise WireError("other bytes came than were sent")

    def retire(self, *, before_generation: int, keep_step: int | None) -> None:
        """Have the snapshots of earlier attempts freed, all but those of one step."""
        self._channel.send(Retire(before_generation=before_generation, keep_step=keep_step))

    def close(self) -> None:
        """Leave."""
        self._channel.close()

    def _ask(self, message: FromAnyone, expected: type[_A]) -> _A:
        self._channel.send(message)
        return self._take(expected)

    def _take(self, expected: type[_A]) -> _A:
        answer = self._channel.receive()
        if not isinstance(answer, expected):
            what = "it is gone" if answer is None else type(answer).__name__
            raise WireError(f"the replica server has it no more ({what})")
        return answer


@dataclass
class RemoteSource:
    """Shards in the memory of another node."""

    node: str
    replicas: Mapping[str, ReplicaInfo]
    connect: Callable[[], RemoteReplicaServer]
    _idle: list[RemoteReplicaServer] = field(default_factory=list[RemoteReplicaServer])
    """Connections that no reader uses; there are as many as there were readers at once, each with its own stream."""

    @property
    def name(self) -> str:
        """Say whose memory it is."""
        return f"the memory of node {self.node[:8]}"

    def get_files(self) -> list[str]:
        """Return the files that are there."""
        return list(self.replicas)

    def get_view(self, file: str, offset: int, num_bytes: int) -> None:
        """Return None: it must be read."""

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Read over the network; a node that is gone is a file that is gone."""
        server: RemoteReplicaServer | None = None
        try:
            try:
                server = self._idle.pop()
            except IndexError:
                server = self.connect()
            server.read_into(self.replicas[file], offset, out)
        except OSError as error:
            if server is not None:
                server.close()
            raise OSError(errno.EIO, f"{self.name} does not give it ({error})") from error
        self._idle.append(server)

    def close(self) -> None:
        """Leave."""
        while self._idle:
            self._idle.pop().close()


@contextmanager
def open_remote(
    node: str, replicas: Mapping[str, ReplicaInfo], address: tuple[str, int], secret: str
) -> "Generator[RemoteSource]":
    """Yield the shards of one node as a source."""
    source = RemoteSource(node, replicas, lambda: RemoteReplicaServer(address, secret, timeout_s=_READ_TIMEOUT_S))
    try:
        yield source
    finally:
        source.close()
