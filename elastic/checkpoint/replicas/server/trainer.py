"""What a trainer asks the replica server of its node for, and the work that goes on for it in the background. No torch
here."""

import contextlib
import os
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from elastic.checkpoint.replicas.inventory import Replica, SupersededError, check_current, cut
from elastic.checkpoint.replicas.messages import (
    Begin,
    Copy,
    Fill,
    FromTrainer,
    HaltCopies,
    Hold,
    Map,
    Mapped,
    Missing,
    Release,
    Settled,
)
from elastic.checkpoint.replicas.messages import Store as StoreState
from elastic.checkpoint.replicas.server.node_disk import NodeDisk, StateName, to_about
from elastic.checkpoint.replicas.server.store import Store
from elastic.checkpoint.replicas.server.visitor import Desk, check_payload
from elastic.checkpoint.replicas.transfer import CopySender, checksum_parts
from elastic.checkpoint.staging.shared_memory import SharedBuffer
from elastic.processes import be_nice
from elastic.transport import Channel, WireError

_CHECKSUM_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))  # a restore of the newest snapshot waits for them
_BATCH = 16
"""Blocks that a thread checksums at a time; handing them out one by one takes as long as the sums themselves."""


class Workers:
    """The threads and the disk that all trainers of a node share."""

    def __init__(self, disk: NodeDisk | None) -> None:
        self.disk = disk
        self.checksummers = ThreadPoolExecutor(_CHECKSUM_THREADS, "checksum", initializer=be_nice)
        self.disk_writer = ThreadPoolExecutor(1, "disk", initializer=be_nice)


class TrainerSession:
    """One trainer's connection; `serve` is its life.

    Args:
        say: takes a line for the log.
    """

    def __init__(
        self,
        channel: Channel[FromTrainer],
        *,
        store: Store,
        desk: Desk,
        workers: Workers,
        secret: str,
        say: Callable[[str], None],
    ) -> None:
        self._channel, self._store, self._desk, self._workers, self._say = channel, store, desk, workers, say
        self._sender = CopySender(store.node, secret)
        self._origin = ""
        self._checks = ThreadPoolExecutor(1, "check", initializer=be_nice)
        self._copies = ThreadPoolExecutor(1, "copy")

    def serve(self) -> None:
        """Do what the trainer asks for until it is gone."""
        try:
            while (message := self._channel.receive()) is not None:
                check_payload(self._channel, message)
                self._obey(message)
        except Exception as error:  # whatever it is, the trainer must learn that it gets no answers any more
            self._say(f"a trainer's connection broke: {error!r}")
            self._channel.close()
        finally:
            self._store.leave(self._origin)
            self._channel.close()
            self._copies.submit(self._sender.forget)
            for pool in (self._checks, self._copies):
                pool.shutdown(wait=False)  # what is under way is worth finishing

    def _obey(self, message: FromTrainer) -> None:
        match message:
            case Hold():
                self._hold(message)
            case Release():
                with self._store.lock:
                    self._store.drop(self._store.require(self._origin, message.index))
            case Begin():
                with self._store.lock:
                    self._store.require(self._origin, message.index).begin(message.generation)
            case Fill():
                self._fill(message)
            case Copy():
                self._copies.submit(self._copy, message, self._sender.begin())
            case HaltCopies():
                self._sender.halt()
            case StoreState():
                self._workers.disk_writer.submit(self._store_state, message)
            case Map():
                self._map(message)
            case _:
                self._desk.obey(self._channel, message)

    def _hold(self, message: Hold) -> None:
        if self._origin not in ("", message.origin):
            raise WireError(f"{self._origin} is {message.origin} now")
        buffer = SharedBuffer(self._channel.take_descriptor(), message.num_bytes)
        self._store.add(Replica(origin=message.origin, index=message.index, buffer=buffer, is_copy=False))
        self._origin = message.origin

    def _fill(self, message: Fill) -> None:
        with self._store.lock:
            replica = self._store.require(self._origin, message.index)
            if not 0 <= message.num_bytes <= replica.buffer.num_bytes:
                raise WireError(f"{message.num_bytes} bytes are not in a buffer of {replica.buffer.num_bytes}")
            replica.fill(message.snapshot, num_bytes=message.num_bytes, chunks=message.chunks, record=message.record)
            version = replica.version
        self._checks.submit(self._check, message, replica, version)

    def _map(self, message: Map) -> None:
        """Answer with the descriptor of a buffer, which its new trainer maps instead of copying it."""
        found = self._store.find(message.origin, message.index, message.snapshot)
        if found is None:
            self._channel.send(Missing(id=message.id))
        else:
            replica, _ = found
            answer = Mapped(id=message.id, num_bytes=replica.num_bytes)
            self._channel.send(answer, descriptor=replica.buffer.descriptor)

    # ---- in the background

    @contextmanager
    def _settling(self, number: int) -> "Generator[list[str]]":
        """Tell the trainer that a job is over: what it has added to the list, or raised, is the problem."""
        problems: list[str] = []
        try:
            yield problems
        except SupersededError:
            problems.append("superseded")
        except OSError as error:
            problems.append(str(error))
        except BaseException as error:  # a snapshot that is never settled stops all that come after it
            self._say(traceback.format_exc())
            problems.append(f"{type(error).__name__}: {error}")
        with contextlib.suppress(WireError):  # the trainer is gone
            self._channel.send(Settled(id=number, problem=next(iter(problems), "")))

    def _check(self, message: Fill, replica: Replica, version: int) -> None:
        """Checksum a filled buffer."""
        with self._settling(message.id):
            with self._store.lock:
                check_current(replica, version)
                done, chunks = replica.checked, replica.chunks

            def checksum(first: int) -> list[int]:
                check_current(replica, version)
                return checksum_parts(replica.buffer, chunks[first : first + _BATCH])

            try:
                batches = self._workers.checksummers.map(checksum, range(0, len(chunks), _BATCH))
                checksums = tuple(one for batch in batches for one in batch)
                with self._store.lock:
                    check_current(replica, version)
                    replica.checksums = checksums
            finally:
                done.set()

    def _copy(self, message: Copy, is_halted: Callable[[], bool]) -> None:
        """Send a copy of a filling to the peer."""
        with self._settling(message.id):
            found = self._store.find(self._origin, message.index, message.snapshot)
            if found is None:
                raise SupersededError
            self._sender.send(*found, message.peer, is_halted)

    def _store_state(self, message: StoreState) -> None:
        """Write the shards of one state that are here, own ones and copies, to the disk."""
        with self._settling(message.id) as problems:
            disk, state = self._workers.disk, StateName(message.generation, message.step)
            if disk is None:
                problems.append("the replica server of this node was given no disk")
                return
            for replica, version in self._store.list_state(generation=state.generation, step=state.step):
                try:
                    self._store_shard(disk, state, replica, version)
                except (OSError, SupersededError) as error:
                    if replica.origin == self._origin:  # a copy is better than none, but its origin has its own disk
                        problems.insert(0, str(error) or "superseded")
            with contextlib.suppress(OSError):  # what cannot be removed does no harm
                disk.retain(state, complete=StateName(*message.complete) if message.complete else None)

    def _store_shard(self, disk: NodeDisk, state: StateName, replica: Replica, version: int) -> None:
        replica.checked.wait()
        with self._store.lock:
            check_current(replica, version)
            info = replica.describe(self._store.node)
        shard = f"{info.snapshot.rank}-of-{info.snapshot.world_size}{'-copy' if replica.is_copy else ''}"
        disk.write(state, shard, to_about(info), cut(replica, version))
