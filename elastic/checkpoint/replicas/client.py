"""A trainer's end of its node's replica server. No torch here."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from elastic.checkpoint.replicas.inventory import Part, ReplicaInfo, Snapshot
from elastic.checkpoint.replicas.messages import (
    ANSWERS,
    Answer,
    Begin,
    Copy,
    Fill,
    FromTrainer,
    HaltCopies,
    Hold,
    Listed,
    ListReplicas,
    Map,
    Mapped,
    Measure,
    Measured,
    Missing,
    Release,
    Retire,
    Settled,
    Store,
)
from elastic.checkpoint.staging.shared_memory import FileBuffer, SharedBuffer
from elastic.transport import Channel, Peer, WireError

_LOOK_EVERY_S = 1.0

_T = TypeVar("_T")


class ReplicaClient:
    """One trainer's connection to the replica server of its node. Calls return at once; answers come as futures.

    Where that replica server has ended, the next call looks for the one that has taken its place, which then holds the
    buffers as well; what they held is not known there.

    Args:
        connection: from `ReplicaServerProcess.open_connection`; None: there is no replica server yet.
        origin: names this trainer, unlike any other of the run.
        reconnect: returns a connection to the next replica server of the node; None if there is none (yet).
    """

    def __init__(
        self,
        connection: socket.socket | None,
        *,
        origin: str,
        reconnect: Callable[[], Peer | None] = lambda: None,
    ) -> None:
        self.origin = origin
        self._reconnect = reconnect
        self._looked_s = -float("inf")
        self._held: dict[int, SharedBuffer] = {}
        self._lock = threading.Lock()
        self._answers: dict[int, Callable[[Answer | WireError], None]] = {}
        self._num_asked = 0
        self._is_gone = True
        self._finding = threading.Lock()
        if connection is None:
            connection, theirs = socket.socketpair()
            theirs.close()
            self._channel = Channel(Peer(connection, None), ANSWERS)
        else:
            self._take_channel(Channel(Peer(connection, None), ANSWERS))

    def hold(self, index: int, buffer: SharedBuffer) -> None:
        """Let the replica server hold a buffer too, so that it outlives this process.

        Raises:
            WireError: the replica server is gone; so for all methods.
        """
        self._held[index] = buffer
        if not self._find_server():  # else it has been told
            self._send_hold(index, buffer)

    def release(self, index: int) -> None:
        """Have the replica server let go of a buffer that will not be filled again."""
        self._held.pop(index, None)
        self._channel.send(Release(index=index))

    def begin(self, index: int, *, generation: int) -> None:
        """Say that a buffer is about to be filled; what it held is void from now on."""
        self._find_server()
        self._channel.send(Begin(index=index, generation=generation))

    def fill(
        self, index: int, snapshot: Snapshot, *, num_bytes: int, chunks: Sequence[Part], record: object
    ) -> Future[str]:
        """Say that a buffer is filled: it counts from now on, whatever becomes of this process.

        Args:
            num_bytes: how much of the buffer the snapshot takes, from its start.
            chunks: offset and size of the parts that get checksums of their own.
            record: JSON value that comes with the snapshot when it is listed.

        Returns:
            Once it is checksummed: an empty string, or what went wrong.
        """

        def build(number: int) -> Fill:
            return Fill(
                id=number,
                index=index,
                snapshot=snapshot,
                num_bytes=num_bytes,
                chunks=tuple(chunks),
                record=record,
            )

        return self._ask(build, _get_problem)

    def copy(self, index: int, snapshot: Snapshot, *, peer: tuple[str, int]) -> Future[str]:
        """Have what a buffer was filled with copied to another replica server, after the copies that were asked for
        before.

        Args:
            peer: host and port of that replica server.

        Returns:
            Once the copy counts: an empty string, or what went wrong.
        """
        return self._ask(lambda number: Copy(id=number, index=index, snapshot=snapshot, peer=peer), _get_problem)

    def halt_copies(self) -> None:
        """Give up the copy under way."""
        self._channel.send(HaltCopies())

    def store(self, *, generation: int, step: int, complete: tuple[int, int] | None) -> Future[str]:
        """Have the shards of a state, with the copies that lie here, written to the disk of the node.

        The buffer must not be filled again meanwhile.

        Args:
            complete: generation and step of a state that is on the disks of all nodes; older ones are removed.

        Returns:
            Once it is there: an empty string, or what went wrong.
        """
        return self._ask(
            lambda number: Store(id=number, generation=generation, step=step, complete=complete), _get_problem
        )

    def fetch_list(self) -> list[ReplicaInfo]:
        """Return what the replica server has in memory, of the chunks the first alone."""
        return self._ask(lambda number: ListReplicas(id=number), _get_replicas).result()

    def fetch_held_bytes(self) -> int:
        """Return how much memory the replica server holds, for this node's trainers and as copies for others.

        What it was told to let go of is free by then, which takes a second for 10 GiB.
        """
        return self._measure().held_bytes

    def fetch_left_bytes(self) -> int:
        """Return how much of that belongs to trainers that are gone: what a world frees once it has a snapshot."""
        return self._measure().left_bytes

    def fetch_copy_bytes(self) -> int:
        """Return how much the replica server holds as copies for others; at once."""
        return self._measure(waits=False).copy_bytes

    def _measure(self, *, waits: bool = True) -> Measured:
        return self._ask(lambda number: Measure(id=number, waits=waits), _get_measured).result()

    def fetch_memory(self, replica: ReplicaInfo) -> SharedBuffer | None:
        """Return a replica itself, shared and not copied; None if it is there no more."""

        def build(number: int) -> Map:
            return Map(id=number, origin=replica.origin, index=replica.index, snapshot=replica.snapshot)

        kind = FileBuffer if replica.is_on_disk else SharedBuffer
        return self._ask(build, lambda answer: self._map(answer, kind)).result()

    def retire(self, *, before_generation: int, keep_step: int | None) -> None:
        """Have the snapshots of earlier attempts freed, all but those of one step."""
        self._channel.send(Retire(before_generation=before_generation, keep_step=keep_step))

    def close(self) -> None:
        """Leave; the replica server keeps what is filled."""
        self._channel.close()

    def _find_server(self) -> bool:
        """Connect to the next replica server if ours has ended, at most once a second; return whether that was so just
        now."""
        with self._finding:
            if not self._is_gone or time.monotonic() < self._looked_s + _LOOK_EVERY_S:
                return False
            self._looked_s = time.monotonic()
            if (peer := self._reconnect()) is None:
                return False
            self._take_channel(Channel(peer, ANSWERS))
            for index, buffer in list(self._held.items()):
                self._send_hold(index, buffer)
            return True

    def _take_channel(self, channel: Channel[Answer]) -> None:
        with self._lock:
            self._channel, self._is_gone = channel, False
        threading.Thread(target=self._listen, args=(channel,), name="replicas", daemon=True).start()

    def _send_hold(self, index: int, buffer: SharedBuffer) -> None:
        message = Hold(origin=self.origin, index=index, num_bytes=buffer.num_bytes)
        self._channel.send(message, descriptor=buffer.descriptor)

    def _ask(self, build: Callable[[int], FromTrainer], get: Callable[[Answer], _T]) -> Future[_T]:
        """Send what `build` makes of a number; return what `get` makes of the answer with that number."""
        self._find_server()
        result: Future[_T] = Future()

        def take(answer: Answer | WireError) -> None:  # on the thread that listens
            if isinstance(answer, WireError):
                result.set_exception(answer)
                return
            try:
                result.set_result(get(answer))
            except Exception as error:
                result.set_exception(error)

        with self._lock:
            self._num_asked += 1
            number = self._num_asked
            if self._is_gone:
                raise WireError("the replica server is gone")
            self._answers[number] = take
        self._channel.send(build(number))
        return result

    def _listen(self, channel: Channel[Answer]) -> None:
        with contextlib.suppress(OSError):  # told below to all calls that wait
            while (answer := channel.receive()) is not None:
                with self._lock:
                    take = self._answers.pop(answer.id, None)
                if take is not None:
                    take(answer)
        with self._lock:
            self._is_gone = True
            waiting, self._answers = self._answers, {}
        channel.close()
        for take in waiting.values():
            take(WireError("the replica server is gone"))

    def _map(self, answer: Answer, kind: type[SharedBuffer]) -> SharedBuffer | None:
        if isinstance(answer, Missing):
            return None
        if not isinstance(answer, Mapped):
            raise _refuse(answer)
        return kind(self._channel.take_descriptor(), answer.num_bytes)


def _get_problem(answer: Answer) -> str:
    if not isinstance(answer, Settled):
        raise _refuse(answer)
    return answer.problem


def _get_replicas(answer: Answer) -> list[ReplicaInfo]:
    if not isinstance(answer, Listed):
        raise _refuse(answer)
    return [listed.unpack() for listed in answer.replicas]


def _get_measured(answer: Answer) -> Measured:
    if not isinstance(answer, Measured):
        raise _refuse(answer)
    return answer


def _refuse(answer: Answer) -> WireError:
    return WireError(f"a {type(answer).__name__} answers another question")
