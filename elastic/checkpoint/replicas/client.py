"""A trainer's end of its node's keeper, and how a keeper is started. No torch here."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, cast

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.replicas.server import KeeperSpec
from elastic.checkpoint.staging.shared_memory import Arena
from elastic.transport import Channel, Header, Peer, WireError, connect

_LOOK_EVERY_S = 1.0
_READY_TIMEOUT_S = 30.0
"""A busy machine takes seconds to start Python."""


@dataclass(kw_only=True)
class KeeperProcess:
    """A keeper that this process started; it ends when this process does or `close` is called."""

    process: subprocess.Popen[bytes]
    channel: Channel
    port: int = 0
    """Where other nodes reach it, at the address it was given, once it is ready; 0: nowhere."""
    is_ready: bool = False

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until it serves; False if it does not in time. Trainers may connect before.

        Raises:
            WireError: it has ended, or said something else.
        """
        if not self.is_ready and self.channel.can_receive(timeout_s):
            self.channel.set_timeout(_READY_TIMEOUT_S)
            ready = self.channel.receive()
            self.channel.set_timeout(None)
            if ready is None:
                raise WireError("the keeper ended while it started; its log says why")
            self.port, self.is_ready = ready["port"], True
        return self.is_ready

    def open_connection(self) -> socket.socket:
        """Return one trainer's connection to the keeper; a fork may take it along.

        Raises:
            WireError: the keeper is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self.channel.send({"kind": "adopt"}, descriptor=theirs.fileno())
        return ours

    def close(self) -> None:
        """End the keeper and free what it holds."""
        self.channel.close()
        self.process.wait()


def start_keeper(*, node: str, ip: str, secret: str, disk: str = "") -> KeeperProcess:
    """Start a keeper and wait until it serves; see `launch_keeper`.

    Raises:
        WireError: it did not start.
        OSError: the kernel has no process or no descriptor for it.
    """
    keeper = launch_keeper(node=node, ip=ip, secret=secret, disk=disk)
    if not keeper.wait_ready(_READY_TIMEOUT_S):
        keeper.process.kill()
        keeper.close()
        raise WireError(f"the keeper was not ready within {_READY_TIMEOUT_S:g} s")
    return keeper


def launch_keeper(*, node: str, ip: str, secret: str, disk: str = "", port: int = 0, folder: str = "") -> KeeperProcess:
    """Start a keeper that ends with this process; call it on the main thread, whose end would end the keeper.

    Args:
        ip: where other nodes reach it; empty: nowhere.
        disk: the run's folder on a disk of the node's own; empty: there is none.
        port: where they look for it, unless that is taken; 0: any.
        folder: where this node's trainers can connect to it by themselves, and to the next one; empty: nowhere.

    Raises:
        OSError: the kernel has no process or no descriptor for it.
    """
    ours, theirs = socket.socketpair()
    channel = Channel(Peer(ours, None))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "elastic.checkpoint.replicas.server"],
                stdin=theirs.fileno(),
                env=env,
                start_new_session=True,  # a Ctrl-C in the terminal is for the trainers, which then save
            )
    except OSError:
        channel.close()
        raise
    keeper = KeeperProcess(process=process, channel=channel)
    spec = KeeperSpec(node=node, owner_pid=os.getpid(), ip=ip, secret=secret, disk=disk, port=port, folder=folder)
    with contextlib.suppress(WireError):  # it has just ended, which `wait_ready` says
        channel.send({"kind": "spec", "spec": asdict(spec)})
    return keeper


@dataclass(frozen=True, kw_only=True)
class Held:
    """A shard that some keeper has in memory."""

    origin: str
    index: int
    snapshot: Snapshot
    num_bytes: int
    chunks: tuple[tuple[int, int], ...]
    """Offset and size of each chunk."""
    checksums: tuple[int, ...] | None
    """CRC-32 of each chunk; None while they are not all known."""
    record: Any
    """What the trainer gave with it."""
    is_copy: bool
    is_on_disk: bool
    """On the node's disk: what an earlier keeper has left there."""
    node: str


class KeeperClient:
    """One trainer's connection to the keeper of its node. Calls return at once; answers come as futures.

    Where that keeper has ended, the next call looks for the one that has taken its place, which then holds the arenas
    as well; what they held is not known there.

    Args:
        connection: from `KeeperProcess.open_connection`; None: there is no keeper yet.
        origin: names this trainer, unlike any other of the run.
        reconnect: returns a connection to the next keeper of the node; None if there is none (yet).
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
        self._held: dict[int, Arena] = {}
        self._lock = threading.Lock()
        self._answers: dict[int, Future[Any]] = {}
        self._num_asked = 0
        self._is_gone = True
        self._finding = threading.Lock()
        if connection is None:
            connection, theirs = socket.socketpair()
            theirs.close()
            self._channel = Channel(Peer(connection, None))
        else:
            self._take_channel(Channel(Peer(connection, None)))

    def hold(self, index: int, arena: Arena) -> None:
        """Let the keeper hold an arena too, so that it outlives this process.

        Raises:
            WireError: the keeper is gone; so for all methods.
        """
        self._held[index] = arena
        if not self._find_keeper():  # else it has been told
            self._send_hold(index, arena)

    def release(self, index: int) -> None:
        """Have the keeper let go of an arena that will not be filled again."""
        self._held.pop(index, None)
        self._channel.send({"kind": "release", "index": index})

    def begin(self, index: int, *, epoch: int) -> None:
        """Say that an arena is about to be filled; what it held is void from now on."""
        self._find_keeper()
        self._channel.send({"kind": "begin", "index": index, "epoch": epoch})

    def fill(
        self,
        index: int,
        snapshot: Snapshot,
        *,
        num_bytes: int,
        chunks: Sequence[tuple[int, int]],
        record: object,
    ) -> Future[str]:
        """Say that an arena is filled: it counts from now on, whatever becomes of this process.

        Args:
            num_bytes: how much of the arena the snapshot takes, from its start.
            chunks: offset and size of the parts that get checksums of their own.
            record: JSON value that comes with the snapshot when it is listed.

        Returns:
            Once it is checksummed: an empty string, or what went wrong.
        """
        fields = {"snapshot": asdict(snapshot), "num_bytes": num_bytes, "chunks": chunks, "record": record}
        return self._ask({"kind": "fill", "index": index, **fields})

    def copy(self, index: int, snapshot: Snapshot, *, peer: tuple[str, int]) -> Future[str]:
        """Have what an arena was filled with copied to another keeper, after the copies that were asked for before.

        Args:
            peer: host and port of that keeper.

        Returns:
            Once the copy counts: an empty string, or what went wrong.
        """
        return self._ask({"kind": "copy", "index": index, "snapshot": asdict(snapshot), "peer": peer})

    def halt_copies(self) -> None:
        """Give up the copy under way."""
        self._channel.send({"kind": "halt"})

    def store(self, *, epoch: int, step: int, complete: tuple[int, int] | None) -> Future[str]:
        """Have the shards of a state, with the copies that lie here, written to the disk of the node.

        The arena must not be filled again meanwhile.

        Args:
            complete: epoch and step of a state that is on the disks of all nodes; older ones are removed.

        Returns:
            Once it is there: an empty string, or what went wrong.
        """
        return self._ask({"kind": "store", "epoch": epoch, "step": step, "complete": complete})

    def fetch_list(self) -> list[Held]:
        """Return what the keeper has in memory."""
        return _to_held(self._ask({"kind": "list"}).result())

    def fetch_held_bytes(self) -> int:
        """Return how much memory the keeper holds, for this node's trainers and as copies for others.

        What it was told to let go of is free by then, which takes a second for 10 GiB.
        """
        return self._measure()["held_bytes"]

    def fetch_left_bytes(self) -> int:
        """Return how much of that trainers have left who are gone: what a world frees once it has a snapshot."""
        return self._measure()["left_bytes"]

    def fetch_copy_bytes(self) -> int:
        """Return how much the keeper holds as copies for others; at once."""
        return self._measure(waits=False)["copy_bytes"]

    def _measure(self, *, waits: bool = True) -> Mapping[str, int]:
        return self._ask({"kind": "measure", "waits": waits}).result()

    def fetch_memory(self, held: Held) -> Arena | None:
        """Return a held shard itself, shared and not copied; None if it is there no more."""
        descriptor, num_bytes = self._ask({"kind": "map", **_name(held)}).result()
        return Arena(descriptor, num_bytes) if descriptor >= 0 else None

    def retire(self, *, before_epoch: int, keep_step: int | None) -> None:
        """Have the snapshots of earlier attempts freed, all but those of one step."""
        self._channel.send({"kind": "retire", "before_epoch": before_epoch, "keep_step": keep_step})

    def close(self) -> None:
        """Leave; the keeper keeps what is filled."""
        self._channel.close()

    def _find_keeper(self) -> bool:
        """Connect to the next keeper if ours has ended, at most once a second; return whether that was so just now."""
        with self._finding:
            if not self._is_gone or time.monotonic() < self._looked_s + _LOOK_EVERY_S:
                return False
            self._looked_s = time.monotonic()
            if (peer := self._reconnect()) is None:
                return False
            self._take_channel(Channel(peer))
            for index, arena in list(self._held.items()):
                self._send_hold(index, arena)
            return True

    def _take_channel(self, channel: Channel) -> None:
        with self._lock:
            self._channel, self._is_gone = channel, False
        threading.Thread(target=self._listen, args=(channel,), name="keeper", daemon=True).start()

    def _send_hold(self, index: int, arena: Arena) -> None:
        header = {"kind": "hold", "origin": self.origin, "index": index}
        self._channel.send({**header, "num_bytes": arena.num_bytes}, descriptor=arena.descriptor)

    def _ask(self, header: Header) -> "Future[Any]":
        self._find_keeper()
        answer: Future[Any] = Future()
        with self._lock:
            self._num_asked += 1
            number = self._num_asked
            if self._is_gone:
                raise WireError("the keeper is gone")
            self._answers[number] = answer
        self._channel.send({**header, "id": number})
        return answer

    def _listen(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):  # said below, to all who wait
            while (message := channel.receive()) is not None:
                self._take(message)
        with self._lock:
            self._is_gone = True
            waiting, self._answers = self._answers, {}
        channel.close()
        for answer in waiting.values():
            answer.set_exception(WireError("the keeper is gone"))

    def _take(self, message: Header) -> None:
        with self._lock:
            answer = self._answers.pop(message["id"])
        match message["kind"]:
            case "kept" | "copied" | "stored":
                answer.set_result(message["problem"])
            case "list":
                answer.set_result(message["held"])
            case "measured":
                answer.set_result(message)
            case "memory":
                answer.set_result((self._channel.take_descriptor(), message["num_bytes"]))
            case _:  # missing
                answer.set_result((-1, 0))


class RemoteKeeper:
    """Another node's keeper, for recovery: lists what it holds and reads from it. One thread at a time.

    Raises:
        WireError: by every method, if the keeper is gone or does not know the secret.
    """

    def __init__(self, address: tuple[str, int], secret: str, *, timeout_s: float) -> None:
        self._channel = Channel(connect(address, secret, purpose="keeper", timeout_s=timeout_s))
        self._channel.set_timeout(timeout_s)

    def fetch_list(self) -> list[Held]:
        """Return what the keeper has in memory."""
        return _to_held(self._ask({"kind": "list"}, "list")["held"])

    def read_into(self, held: Held, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a held shard from `start`.

        Where no checksums are known yet, the keeper takes one of what it sends: what was damaged on the way is noticed.
        """
        sums = held.checksums is None
        self._ask({"kind": "read", **_name(held), "start": start, "size": len(out), "sums": sums}, "data")
        self._channel.receive_into(out)
        if sums and crc32(out) != self._take("sum")["crc32"]:
            raise WireError("other bytes came than were sent")

    def retire(self, *, before_epoch: int, keep_step: int | None) -> None:
        """Have the snapshots of earlier attempts freed, all but those of one step."""
        self._channel.send({"kind": "retire", "before_epoch": before_epoch, "keep_step": keep_step})

    def close(self) -> None:
        """Leave."""
        self._channel.close()

    def _ask(self, header: Header, expected: str) -> Header:
        self._channel.send(header)
        return self._take(expected)

    def _take(self, expected: str) -> Header:
        answer = self._channel.receive()
        if answer is None or answer["kind"] != expected:
            raise WireError(f"the keeper has it no more ({(answer or {}).get('kind', 'it is gone')})")
        return answer


def _name(held: Held) -> dict[str, object]:
    return {"origin": held.origin, "index": held.index, "snapshot": asdict(held.snapshot)}


def _to_held(rows: Sequence[Mapping[str, Any]]) -> list[Held]:
    return [
        Held(
            origin=row["origin"],
            index=row["index"],
            snapshot=Snapshot(**row["snapshot"]),
            num_bytes=row["num_bytes"],
            chunks=tuple((offset, size) for offset, size in cast("list[tuple[int, int]]", row["chunks"])),
            checksums=None if row["checksums"] is None else tuple(row["checksums"]),
            record=row["record"],
            is_copy=row["is_copy"],
            is_on_disk=row["is_on_disk"],
            node=row["node"],
        )
        for row in rows
    ]
