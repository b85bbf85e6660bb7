"""One trainer process' part of the memory tier: its buffers, its replica server, and what other replica servers hold.
Outlives worlds.

Whatever goes wrong with a replica server costs a snapshot, never the run: the storage still has the last checkpoint.
"""

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zlib import crc32

import torch

from elastic.checkpoint.bandwidth import Rates
from elastic.checkpoint.format.manifest import Manifest
from elastic.checkpoint.format.sources import ShardSource
from elastic.checkpoint.replicas.client import ReplicaClient
from elastic.checkpoint.replicas.discovery import (
    WholeSnapshot,
    build_record,
    get_newest_whole_step,
    list_blocks,
)
from elastic.checkpoint.replicas.inventory import ReplicaInfo, Snapshot
from elastic.checkpoint.replicas.remote import open_remote
from elastic.checkpoint.replicas.survey import fetch_all
from elastic.checkpoint.staging.device_cache import Rows
from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.staging.host_memory import MOST_BUFFERS, MemoryBudget, get_available_bytes
from elastic.checkpoint.staging.shared_memory import SharedBuffer
from elastic.checkpoint.staging.write_plan import SavePlan
from elastic.ports import Address
from elastic.transport import WireError, connect_unix

logger = logging.getLogger(__name__)

_TRAIL_S = 5.0
"""What was handed over is in the memory of its nodes within half a second; but a node that leaves may be gone."""
_TRAIL_PAUSE_S = 0.05


class Memory:
    """Snapshots of this process, in memory that its node's replica server holds as well.

    Args:
        connection: to the replica server, from `ReplicaServerProcess.open_connection`; None: there is none yet.
        node: whose replica server that is.
        secret: opens the replica servers of the other nodes.
        folder: where the node's next replica server can be reached once that one has ended; None: nowhere.
    """

    def __init__(self, connection: socket.socket | None, *, node: str, secret: str, folder: Path | None = None) -> None:
        self.node = node
        self._secret = secret
        origin = f"{node}-{os.getpid()}-{secrets.token_hex(4)}"
        self._client = ReplicaClient(
            connection, origin=origin, reconnect=lambda: connect_unix(folder) if folder else None
        )
        self._buffers: HostBuffers | None = None
        self._filled: dict[int, Snapshot] = {}
        self._trailing: tuple[Snapshot, Future[str]] | None = None
        self._taken: tuple[Snapshot, Sequence[Rows]] | None = None
        self.expected_step = 0
        """The step that the world before has handed over on its devices; 0: none that this process knows of."""
        self.rates = Rates()

    def get_buffers(self, device: torch.device) -> HostBuffers:
        """Return the buffers to stage in; the same ones in every world."""
        if self._buffers is None:
            self._buffers = HostBuffers(
                device,
                count=MOST_BUFFERS,
                on_allocated=self._hold,
                on_released=self._let_go,
                wait_for_freed=self._fetch_left_bytes,  # the replica server answers once all is free
            )
        return self._buffers

    def measure_budget(
        self, shard_bytes: int, local_rank: int, *, num_buffers: int, num_copies: int, waits: bool
    ) -> MemoryBudget:
        """Return what this rank needs for snapshots of shards of this size, and what its node has.

        Args:
            local_rank: what copies take already is counted by the first rank of a node.
            num_copies: of each shard; this node holds as many for others as it has shards.
            waits: until all is free that was held for earlier attempts and is retired; and counts what will be.
        """
        left_bytes = self._fetch_left_bytes() if waits else 0
        capacity, held_bytes, num_held = 0, 0, 0
        if buffers := self._buffers:
            capacity, held_bytes, num_held = buffers.capacity_bytes, buffers.held_bytes, buffers.num_held
        fits = shard_bytes <= capacity
        size = capacity if fits else shard_bytes
        own_bytes = max(0, num_buffers - num_held) * size if fits else num_buffers * size
        copy_bytes = num_copies * size - (self._fetch_copy_bytes() if local_rank == 0 and num_copies else 0)
        available = get_available_bytes()
        return MemoryBudget(
            node=crc32(self.node.encode()),
            first_bytes=0 if fits else shard_bytes,
            more_bytes=copy_bytes + own_bytes - (0 if fits else held_bytes),
            all_bytes=copy_bytes + own_bytes,
            left_bytes=left_bytes,
            available_bytes=sys.maxsize if available is None else available,
        )

    def begin(self, index: int, *, generation: int) -> None:
        """Say that a buffer is about to be filled."""
        self._filled.pop(index, None)
        with contextlib.suppress(WireError):  # `fill` tells
            self._client.begin(index, generation=generation)

    def fill(self, index: int, snapshot: Snapshot, plan: SavePlan, manifest: Manifest) -> str:
        """Say that a buffer is filled: it outlives this process from now on; return what is wrong with that."""
        self._filled[index] = snapshot
        try:
            self._client.fill(
                index,
                snapshot,
                num_bytes=plan.own.num_bytes,
                chunks=list_blocks(plan.own),
                record=build_record(plan.own_file, plan.own, manifest),
            )
        except WireError as error:
            return str(error)
        return ""

    def copy(self, index: int, snapshot: Snapshot, *, peer: Address) -> "Future[str]":
        """Have what was filled copied to another node; see `ReplicaClient.copy`."""
        try:
            return self._client.copy(index, snapshot, peer=peer)
        except WireError as error:
            return _fail(error)

    def halt_copies(self) -> None:
        """Give up the copy under way."""
        with contextlib.suppress(WireError):  # with the replica server
            self._client.halt_copies()

    def store(self, snapshot: Snapshot, *, complete: tuple[int, int] | None) -> "Future[str]":
        """Have what this node holds of a snapshot's state written to its disk; see `ReplicaClient.store`."""
        try:
            return self._client.store(generation=snapshot.generation, step=snapshot.step, complete=complete)
        except WireError as error:
            return _fail(error)

    def find_index(self, *, generation: int, step: int) -> int | None:
        """Return the buffer of this process that holds its shard of a state, if one does."""
        return next((index for index, s in self._filled.items() if (s.generation, s.step) == (generation, step)), None)

    def retire(self, *, before_generation: int, keep_step: int | None) -> None:
        """Have this node's replica server free what earlier attempts have left, all but one step."""
        with contextlib.suppress(WireError):
            self._client.retire(before_generation=before_generation, keep_step=keep_step)

    def fetch_all(self, replica_servers: Mapping[str, Address], *, expected_step: int = 0) -> list[ReplicaInfo]:
        """Return what all replica servers hold; one that does not answer, however long it is needed, holds nothing.

        Args:
            expected_step: a snapshot of which some shard is on its way to memory; it is waited for.
        """
        until_s = time.monotonic() + _TRAIL_S
        while True:
            found = fetch_all(replica_servers, self._secret)
            if not expected_step or get_newest_whole_step(found) >= expected_step:
                return found
            if time.monotonic() > until_s:
                logger.warning("step %d was handed over, and is not whole in memory", expected_step)
                return found
            time.sleep(_TRAIL_PAUSE_S)

    def trail(self, snapshot: Snapshot, kept: "Future[str]", taken: Sequence[Rows]) -> None:
        """Have a snapshot come to memory after its world has ended.

        Args:
            kept: once it is there.
            taken: what this process has got of other ranks' shards of it, on its device.
        """
        self._trailing, self._taken = (snapshot, kept), (snapshot, taken)

    def finish_trailing(self) -> None:
        """Return when no snapshot of the world before is on its way any more."""
        if self._trailing:
            (snapshot, kept), self._trailing = self._trailing, None
            self.expected_step = snapshot.step
            if problem := kept.result():
                logger.warning("step %d is not safe in memory: %s", snapshot.step, problem)

    def find_resident(self, snapshot: WholeSnapshot) -> list[Rows]:
        """Return what of a snapshot is on this process' device: made there, or taken over, which it then forgets."""
        engine = self._buffers.engine if self._buffers else None
        found: list[Rows] = []
        for file, places in snapshot.places.items():
            for replica in places:
                if engine and self._is_own(replica) and (rows := engine.find_resident(replica.index, file)):
                    found.append(rows)
                    break
        taken, self._taken = self._taken, None
        if taken and (taken[0].generation, taken[0].step) == (snapshot.manifest.generation, snapshot.step):
            found += taken[1]
        return found

    @contextmanager
    def open_sources(
        self, snapshot: WholeSnapshot, replica_servers: Mapping[str, Address]
    ) -> Generator[Sequence[ShardSource]]:
        """Yield where the shards can be read: this node's memory first, which is not copied, then the other nodes'."""
        by_node: dict[str, dict[str, ReplicaInfo]] = {}
        for file, places in snapshot.places.items():
            for replica in places:
                by_node.setdefault(replica.node, {}).setdefault(file, replica)
        with ExitStack() as stack:
            sources: list[ShardSource] = []
            if self.node in by_node:
                sources.append(stack.enter_context(self._share(by_node.pop(self.node))))
            for node, replicas in by_node.items():
                if node in replica_servers:
                    sources.append(
                        stack.enter_context(open_remote(node, replicas, replica_servers[node], self._secret))
                    )
            yield sources

    @contextmanager
    def _share(self, shards: Mapping[str, ReplicaInfo]) -> "Generator[_SharedSource]":
        own: dict[str, memoryview] = {}
        others: dict[str, SharedBuffer] = {}
        for file, replica in shards.items():
            if self._buffers and self._is_own(replica):
                own[file] = self._buffers.get(replica.index).numpy().data
                continue
            with contextlib.suppress(WireError):
                if buffer := self._client.fetch_memory(replica):
                    others[file] = buffer
        try:
            yield _SharedSource(self.node, own, others)
        finally:
            for buffer in others.values():
                buffer.close()

    def _is_own(self, replica: ReplicaInfo) -> bool:
        """Tell whether this process itself has filled a shard: its pages are mapped."""
        return replica.origin == self._client.origin and self._filled.get(replica.index) == replica.snapshot

    def _hold(self, index: int, buffer: SharedBuffer) -> None:
        with contextlib.suppress(WireError):
            self._client.hold(index, buffer)

    def _fetch_left_bytes(self) -> int:
        try:
            return self._client.fetch_left_bytes()
        except WireError:  # it ends with the replica server
            return 0

    def _fetch_copy_bytes(self) -> int:
        try:
            return self._client.fetch_copy_bytes()
        except WireError:
            return 0

    def _let_go(self, index: int) -> None:
        self._filled.pop(index, None)
        with contextlib.suppress(WireError):
            self._client.release(index)


def _fail(error: WireError) -> "Future[str]":
    problem: Future[str] = Future()
    problem.set_result(str(error))
    return problem


class _SharedSource:
    """Shards in the memory of this node: those that this process has filled, and those of others."""

    def __init__(self, node: str, own: Mapping[str, memoryview], others: Mapping[str, SharedBuffer]) -> None:
        self.name = f"the memory of node {node[:8]}"
        self._own, self._others = own, others

    def get_files(self) -> list[str]:
        """Return the files that are here."""
        return [*self._own, *self._others]

    def get_view(self, file: str, offset: int, num_bytes: int) -> memoryview | None:
        """Return the bytes where they are, if this process has filled them."""
        return self._own[file][offset : offset + num_bytes] if file in self._own else None

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Copy what another process has filled."""
        self._others[file].read_into(offset, out)
