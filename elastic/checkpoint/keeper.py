"""The keeper: one process per node that holds snapshots in host memory while the trainers that made them come and go.

A trainer fills an arena and hands it over; the keeper checksums it, sends a copy to the keeper of another node, and
serves it at the next recovery. None of that takes the trainer's interpreter lock or the time of its training thread. It
imports no torch, so it starts at once and is small.

What was written to the node's disk on request is served like memory by the next keeper there.

It is led over the socket that is its standard input: `adopt` brings the connection of one more trainer. It ends with
its owner (PR_SET_PDEATHSIG, and the end of that socket), and all it holds is anonymous memory that ends with it. Other
nodes' keepers and trainers come over TCP and know the run's secret.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from zlib_ng.zlib_ng import crc32

from elastic.checkpoint.arena import GIB, Arena, allocate_arena
from elastic.checkpoint.holdings import Holding, Snapshot, SupersededError, check_current, cut, describe
from elastic.checkpoint.host_memory import get_available_bytes
from elastic.checkpoint.node_disk import NodeDisk, StateName
from elastic.errors import CheckpointError
from elastic.transport import PIECE_BYTES, Acceptor, Channel, Header, Peer, WireError, connect, listen_unix

_PR_SET_PDEATHSIG = 1
_NICENESS = 10  # on a machine without a core to spare, training goes first
_CHECKSUM_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))  # whoever restores the newest snapshot waits for them
_BATCH = 16
"""Blocks that a thread checksums at a time; handing them out one by one takes as long as the sums themselves."""
_LOOK_EVERY_S = 1.0
_PEER_TIMEOUT_S = 30.0
"""A lost machine sends no FIN; a living one takes its bytes and checks a copy sooner than this."""


@dataclass(frozen=True, kw_only=True)
class KeeperSpec:
    """What a keeper must know to start; its first message, so that the secret is in no process list."""

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


@dataclass(kw_only=True)
class _Trainer:
    """A connected trainer and what goes on for it in the background."""

    channel: Channel
    origin: str = ""
    copies: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "copy"))
    peer: Channel | None = None
    peer_address: tuple[str, int] | None = None


class Keeper:
    """The state of the process; `serve` is its life."""

    def __init__(self, spec: KeeperSpec, owner: Channel) -> None:
        self._spec = spec
        self._owner = owner
        self._lock = threading.Lock()
        self._holdings: dict[tuple[str, int], Holding] = {}
        self._origins: set[str] = set()
        """The trainers of this node that are connected: their arenas are theirs to fill again."""
        self._checksummers = ThreadPoolExecutor(_CHECKSUM_THREADS, "checksum")
        self._disk = NodeDisk(Path(spec.disk)) if spec.disk else None
        self._disk_writer = ThreadPoolExecutor(1, "disk")
        self._freer = ThreadPoolExecutor(1, "free")

    def serve(self, listener: socket.socket | None) -> None:
        """Adopt trainers and serve strangers who know the secret, until the owner ends."""
        if self._disk is not None:
            self._find_stored(self._disk)
        if listener is not None:
            threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()
        if self._spec.folder:
            folder = Path(self._spec.folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            here = listen_unix(folder)
            threading.Thread(target=self._accept_trainers, args=(here,), name="accept-here", daemon=True).start()
        while (message := self._owner.receive()) is not None:
            if message["kind"] == "adopt":
                self._adopt()

    # ---- trainers of this node

    def _accept_trainers(self, listener: socket.socket) -> None:
        """Take trainers of this node whose keeper was another one before, or none."""
        acceptor = Acceptor(listener, say=_log, secret=None)
        while True:
            for peer in acceptor.turn(_LOOK_EVERY_S):
                try:
                    _start_thread(self._serve_trainer, _Trainer(channel=Channel(peer)))
                except RuntimeError as error:  # no more threads
                    _log(f"a trainer gets no snapshots: {error}")
                    peer.socket.close()

    def _adopt(self) -> None:
        """Serve one more trainer, if that can be: one that cannot be served trains on without snapshots."""
        try:
            connection = socket.socket(fileno=self._owner.take_descriptor())
        except OSError as error:  # the kernel drops a descriptor that a process has no room for
            _log(f"a trainer gets no snapshots: {error}")
            return
        try:
            _start_thread(self._serve_trainer, _Trainer(channel=Channel(Peer(connection, None))))
        except RuntimeError as error:  # no more threads
            _log(f"a trainer gets no snapshots: {error}")
            connection.close()

    def _serve_trainer(self, trainer: _Trainer) -> None:
        try:
            while (message := trainer.channel.receive()) is not None:
                self._obey_trainer(trainer, message)
        except Exception as error:  # whatever it is, the trainer must learn that nobody answers it any more
            _log(f"a trainer's connection broke: {error!r}")
            trainer.channel.close()
        finally:
            with self._lock:
                self._origins.discard(trainer.origin)
                own = [h for h in self._holdings.values() if h.origin == trainer.origin and not h.is_copy]
                for holding in own:
                    if holding.snapshot is None:
                        self._drop(holding)
            trainer.channel.close()
            trainer.copies.submit(_forget_peer, trainer)
            trainer.copies.shutdown(wait=False)  # a copy under way is worth finishing

    def _obey_trainer(self, trainer: _Trainer, message: Header) -> None:
        match message["kind"]:
            case "hold":
                trainer.origin = message["origin"]
                arena = Arena(trainer.channel.take_descriptor(), message["num_bytes"])
                holding = Holding(origin=trainer.origin, index=message["index"], arena=arena, is_copy=False)
                with self._lock:
                    self._origins.add(trainer.origin)
                    self._holdings[trainer.origin, holding.index] = holding
            case "release":
                with self._lock:
                    self._drop(self._holdings[trainer.origin, message["index"]])
            case "begin":
                self._begin(self._holdings[trainer.origin, message["index"]], message["epoch"])
            case "fill":
                holding = self._holdings[trainer.origin, message["index"]]
                self._fill(holding, message)
                generation = holding.generation
                trainer.copies.submit(self._finish, trainer, holding, generation, message)
            case "store":
                self._disk_writer.submit(self._store, trainer, message)
            case "map":
                self._give_memory(trainer.channel, message)
            case _:
                self._obey_anyone(trainer.channel, message)

    def _begin(self, holding: Holding, epoch: int) -> None:
        with self._lock:
            holding.snapshot, holding.epoch = None, epoch
            holding.generation += 1
            holding.checked.set()
            holding.checked = threading.Event()

    def _fill(self, holding: Holding, message: Header) -> None:
        with self._lock:
            holding.snapshot = Snapshot(**message["snapshot"])
            holding.num_bytes = message["num_bytes"]
            holding.chunks = [(offset, size) for offset, size in message["chunks"]]
            holding.record = message["record"]

    def _finish(self, trainer: _Trainer, holding: Holding, generation: int, message: Header) -> None:
        """Checksum a filled arena, send a copy away, and tell the trainer that it may rely on both."""
        problem = ""
        try:
            self._checksum(holding, generation)
            if message["peer"]:
                self._copy(trainer, holding, generation, tuple(message["peer"]))
        except SupersededError:
            problem = "superseded"
        except OSError as error:
            problem = str(error)
        except BaseException as error:  # a snapshot that is never settled stops all that come after it
            _log(traceback.format_exc())
            problem = f"{type(error).__name__}: {error}"
        _reply(trainer, message, kind="kept", problem=problem)

    def _checksum(self, holding: Holding, generation: int) -> None:
        done = holding.checked
        try:
            view = holding.arena.view
            parts = [view[offset : offset + size] for offset, size in holding.chunks]
            batches = [parts[first : first + _BATCH] for first in range(0, len(parts), _BATCH)]
            checksums = [one for batch in self._checksummers.map(_checksum_all, batches) for one in batch]
            with self._lock:
                check_current(holding, generation)
                holding.checksums = checksums
        finally:
            done.set()

    def _copy(self, trainer: _Trainer, holding: Holding, generation: int, address: tuple[str, int]) -> None:
        try:
            if trainer.peer is None or trainer.peer_address != address:
                trainer.peer = Channel(connect(address, self._spec.secret, purpose="keeper"))
                trainer.peer_address = address
                trainer.peer.set_timeout(_PEER_TIMEOUT_S)
            with self._lock:
                check_current(holding, generation)
                header = {"kind": "push", **describe(holding, self._spec.node), "capacity": holding.arena.num_bytes}
            trainer.peer.send(header, cut(holding, generation), num_bytes=holding.num_bytes)
            answer = trainer.peer.receive()
            if answer is None or answer["kind"] != "pushed":
                raise WireError(f"the copy was refused: {(answer or {}).get('problem', 'the peer is gone')}")
        except (OSError, SupersededError):
            _forget_peer(trainer)
            raise

    def _store(self, trainer: _Trainer, message: Header) -> None:
        try:
            problem = self._store_all(trainer, message)
        except BaseException as error:  # as for `_finish`
            _log(traceback.format_exc())
            problem = f"{type(error).__name__}: {error}"
        _reply(trainer, message, kind="stored", problem=problem)

    def _store_all(self, trainer: _Trainer, message: Header) -> str:
        """Write the shards of one state that lie here, own ones and copies, to the disk; return what went wrong."""
        state = StateName(message["epoch"], message["step"])
        complete = StateName(*message["complete"]) if message["complete"] else None
        disk, problem = self._disk, ""
        if disk is None:
            return "the keeper of this node was given no disk"
        with self._lock:
            holdings = [
                (holding, holding.generation)
                for holding in self._holdings.values()
                if (own := holding.snapshot) and (own.epoch, own.step) == state and not holding.is_on_disk
            ]
        for holding, generation in holdings:
            try:
                self._store_one(disk, state, holding, generation)
            except (OSError, SupersededError) as error:
                if holding.origin == trainer.origin:  # a copy is better than none, but its origin has its own disk
                    problem = str(error) or "superseded"
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            disk.retain(state, complete=complete)
        return problem

    def _store_one(self, disk: NodeDisk, state: StateName, holding: Holding, generation: int) -> None:
        holding.checked.wait()
        with self._lock:
            check_current(holding, generation)
            about = describe(holding, self._spec.node)
        rank, world_size = about["snapshot"]["rank"], about["snapshot"]["world_size"]
        shard = f"{rank}-of-{world_size}{'-copy' if holding.is_copy else ''}"
        disk.write(state, shard, about, cut(holding, generation))

    def _find_stored(self, disk: NodeDisk) -> None:
        """Offer what an earlier keeper has written."""
        try:
            for stored in disk.open_all():
                about = stored.about
                holding = Holding(
                    origin=stored.name,
                    index=0,
                    arena=stored.arena,
                    is_copy=about["is_copy"],
                    is_on_disk=True,
                    epoch=about["snapshot"]["epoch"],
                )
                self._fill(holding, dict(about))
                holding.checksums = about["checksums"]
                holding.checked.set()
                self._holdings[holding.origin, holding.index] = holding
        except (OSError, KeyError, TypeError, ValueError) as error:
            _log(f"the snapshots in {self._spec.disk} cannot be read: {error!r}")

    def _give_memory(self, channel: Channel, message: Header) -> None:
        """Answer with the descriptor of an arena, which its new trainer maps instead of copying it."""
        holding = self._find(message)
        if holding is None:
            channel.send({"kind": "missing", "id": message.get("id")})
        else:
            answer = {"kind": "memory", "id": message.get("id"), "num_bytes": holding.num_bytes}
            channel.send(answer, descriptor=holding.arena.descriptor)

    # ---- anyone who knows the secret

    def _accept(self, listener: socket.socket) -> None:
        """Take who knows the secret; one thread greets them all, and nothing that a stranger does ends it."""
        acceptor = Acceptor(listener, say=_log, secret=self._spec.secret, purpose="keeper")
        while True:
            for peer in acceptor.turn(_LOOK_EVERY_S):
                try:
                    _start_thread(self._serve_stranger, Channel(peer))
                except RuntimeError as error:  # no more threads
                    _log(f"a connection was ended: {error}")
                    peer.socket.close()

    def _serve_stranger(self, channel: Channel) -> None:
        try:
            while (message := channel.receive()) is not None:
                self._obey_anyone(channel, message)
        except (WireError, KeyError, TypeError, ValueError, SupersededError) as error:
            _log(f"a connection ended: {error!r}")
        finally:
            channel.close()

    def _obey_anyone(self, channel: Channel, message: Header) -> None:
        match message["kind"]:
            case "push":
                self._take_copy(channel, message)
            case "list":
                channel.send({"kind": "list", "id": message.get("id"), "held": self._list()})
            case "read":
                self._read(channel, message)
            case "retire":
                self._retire(message["before_epoch"], message["keep_step"])
            case "measure":
                self._freer.submit(lambda: None).result()  # what was let go of is free
                with self._lock:
                    in_memory = [holding for holding in self._holdings.values() if not holding.is_on_disk]
                    left = [holding for holding in in_memory if self._is_left(holding)]
                sums = {
                    "held_bytes": sum(holding.arena.num_bytes for holding in in_memory),
                    "left_bytes": sum(holding.arena.num_bytes for holding in left),
                }
                channel.send({"kind": "measured", "id": message.get("id"), **sums})
            case kind:
                raise WireError(f"{kind!r} is no message that a keeper knows")

    def _list(self) -> list[dict[str, Any]]:
        with self._lock:
            holdings = [holding for holding in self._holdings.values() if holding.snapshot is not None]
        for holding in holdings:
            holding.checked.wait()
        with self._lock:
            return [describe(holding, self._spec.node) for holding in holdings if holding.snapshot is not None]

    def _take_copy(self, channel: Channel, message: Header) -> None:
        """Receive what another node's trainer has filled, into memory that mirrors its arena."""
        key = (str(message["origin"]), int(message["index"]))
        num_bytes, capacity = int(message["bytes"]), int(message["capacity"])
        with self._lock:
            holding = self._holdings.get(key)
            if holding is not None and (not holding.is_copy or holding.arena.num_bytes < num_bytes):
                raise WireError(f"{key} is no copy of {num_bytes} bytes")
        problem = ""
        if holding is None:
            try:
                self._freer.submit(lambda: None).result()  # what was let go of is free
                with self._lock:
                    copies = [holding for holding in self._holdings.values() if holding.is_copy]
                    _check_memory(capacity, sum(copy.arena.num_bytes for copy in copies if not copy.num_bytes))
                    arena = allocate_arena(capacity, name="copy")
                    holding = Holding(origin=key[0], index=key[1], arena=arena, is_copy=True)
                    self._holdings[key] = holding
            except CheckpointError as error:
                problem = str(error)
        if holding is None:
            _swallow(channel, num_bytes)
        else:
            self._begin(holding, message["snapshot"]["epoch"])
            generation = holding.generation
            channel.receive_into(holding.arena.view[:num_bytes])
            self._fill(holding, {**message, "num_bytes": num_bytes})
            self._checksum(holding, generation)
            if holding.checksums != message["checksums"]:
                self._begin(holding, message["snapshot"]["epoch"])
                problem = "the copy has other bytes than the original"
        channel.send({"kind": "refused" if problem else "pushed", "problem": problem})

    def _read(self, channel: Channel, message: Header) -> None:
        holding = self._find(message)
        if holding is None:
            channel.send({"kind": "missing", "id": message.get("id")})
            return
        start, size = int(message["start"]), int(message["size"])
        if not 0 <= start <= start + size <= holding.num_bytes:
            raise WireError(f"bytes {start} to {start + size} are outside of {holding.num_bytes}")
        view = holding.arena.view[start : start + size]
        pieces = (view[at : at + PIECE_BYTES] for at in range(0, size, PIECE_BYTES))
        channel.send({"kind": "data", "id": message.get("id")}, pieces, num_bytes=size)

    def _retire(self, before_epoch: int, keep_step: int | None) -> None:
        """Free what a newer attempt has made worthless; `keep_step`, what it started from, stays.

        Arenas of a connected trainer stay: it fills them again.
        """
        with self._lock:
            for holding in list(self._holdings.values()):
                step = holding.snapshot.step if holding.snapshot else None
                is_in_use = not holding.is_copy and not self._is_left(holding)
                if holding.epoch < before_epoch and not is_in_use and (step is None or step != keep_step):
                    self._drop(holding)

    def _is_left(self, holding: Holding) -> bool:
        """Tell whether its trainer has gone."""
        return not holding.is_copy and holding.origin not in self._origins

    def _find(self, message: Header) -> Holding | None:
        with self._lock:
            holding = self._holdings.get((message["origin"], message["index"]))
            wanted = Snapshot(**message["snapshot"])
            return holding if holding is not None and holding.snapshot == wanted else None

    def _drop(self, holding: Holding) -> None:
        holding.generation += 1
        holding.snapshot = None
        holding.checked.set()
        del self._holdings[holding.origin, holding.index]
        # takes seconds, and the caller has the lock
        self._freer.submit(holding.arena.close).add_done_callback(_tell_failure)


def _forget_peer(trainer: _Trainer) -> None:
    if trainer.peer is not None:
        trainer.peer.close()
        trainer.peer = None


def _check_memory(num_bytes: int, awaited_bytes: int) -> None:
    """Refuse a copy that would take the memory that this node's own trainers need.

    Args:
        awaited_bytes: promised to copies of which none has come whole yet, so that it is not taken up.

    Raises:
        CheckpointError: less is available.
    """
    available = get_available_bytes()
    if available is not None and available < awaited_bytes + num_bytes + GIB // 4:
        raise CheckpointError(
            f"the peer has {available / GIB:.2f} GiB of host memory left, but a copy needs {num_bytes / GIB:.2f} GiB. "
            "Give the nodes more memory, or set checkpoint.memory=node."
        )


def _swallow(channel: Channel, num_bytes: int) -> None:
    scrap = memoryview(bytearray(min(num_bytes, PIECE_BYTES)))
    while num_bytes:
        channel.receive_into(scrap[:num_bytes])
        num_bytes -= min(num_bytes, PIECE_BYTES)


def _reply(trainer: _Trainer, message: Header, *, kind: str, **fields: object) -> None:
    with contextlib.suppress(WireError):  # it is gone; nobody is left to tell
        trainer.channel.send({"kind": kind, "id": message["id"], **fields})


def _checksum_all(parts: Sequence[memoryview]) -> list[int]:
    return [crc32(part) for part in parts]


def _start_thread(target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


def _tell_failure(job: "Future[None]") -> None:
    """Say what a job failed of that nobody waits for."""
    if (error := job.exception()) is not None:
        _log(f"a job in the background failed: {error!r}")


def _log(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk ends no keeper
        print(f"keeper: {text}", file=sys.stderr, flush=True)  # noqa: T201 (the log of whoever started it)


def _listen(ip: str, port: int) -> socket.socket:
    try:
        return socket.create_server((ip, port))
    except OSError:  # somebody else has the port by now
        return socket.create_server((ip, 0))


def main() -> NoReturn:
    """Become the keeper that the first message on standard input describes."""
    owner = Channel(Peer(socket.socket(fileno=os.dup(0)), None))
    message = owner.receive()
    assert message is not None
    spec = KeeperSpec(**message["spec"])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec.owner_pid:
        os._exit(1)
    os.nice(_NICENESS)
    listener = _listen(spec.ip, spec.port) if spec.ip else None
    try:
        owner.send({"kind": "ready", "port": listener.getsockname()[1] if listener else 0})
        Keeper(spec, owner).serve(listener)
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # threads may be in the middle of a write that nobody waits for


if __name__ == "__main__":
    main()
