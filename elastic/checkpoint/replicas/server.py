"""The keeper: one process per node that holds snapshots in host memory while the trainers that made them come and go.

A trainer fills an arena and hands it over: from then on it is listed and served, whatever else goes on. The keeper
checksums it, and sends a copy to the keeper of another node when it is told to. None of that takes the trainer's
interpreter lock or the time of its training thread. It imports no torch, so it starts at once and is small.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from elastic.checkpoint.replicas.inventory import Holding, Snapshot, SupersededError, check_current, cut, describe
from elastic.checkpoint.replicas.node_disk import NodeDisk, StateName
from elastic.checkpoint.replicas.transfer import CopySender, Incoming, SummedPieces, checksum_parts
from elastic.checkpoint.staging.host_memory import get_available_bytes
from elastic.checkpoint.staging.shared_memory import GIB, Arena, allocate_arena
from elastic.errors import CheckpointError
from elastic.processes import be_nice
from elastic.transport import Acceptor, Channel, Header, Peer, WireError, listen_unix

_PR_SET_PDEATHSIG = 1
_CHECKSUM_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))  # whoever restores the newest snapshot waits for them
_BATCH = 16
"""Blocks that a thread checksums at a time; handing them out one by one takes as long as the sums themselves."""
_LOOK_EVERY_S = 1.0
_LEFT_S = 2.0
"""A connection of a copy that was given up is gone by then; else its memory is left to it."""


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
    sender: CopySender
    origin: str = ""
    checks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "check", initializer=be_nice))
    copies: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "copy"))


class Keeper:
    """The state of the process; `serve` is its life."""

    def __init__(self, spec: KeeperSpec, owner: Channel) -> None:
        self._spec = spec
        self._owner = owner
        self._lock = threading.Lock()
        self._holdings: dict[tuple[str, int], Holding] = {}
        self._origins: set[str] = set()
        """The trainers of this node that are connected: their arenas are theirs to fill again."""
        self._incoming: dict[tuple[str, int], Incoming] = {}
        """Copies that come."""
        self._checksummers = ThreadPoolExecutor(_CHECKSUM_THREADS, "checksum", initializer=be_nice)
        self._disk = NodeDisk(Path(spec.disk)) if spec.disk else None
        self._disk_writer = ThreadPoolExecutor(1, "disk", initializer=be_nice)
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
                self._begin_trainer(peer)

    def _adopt(self) -> None:
        """Serve one more trainer, if that can be: one that cannot be served trains on without snapshots."""
        try:
            connection = socket.socket(fileno=self._owner.take_descriptor())
        except OSError as error:  # the kernel drops a descriptor that a process has no room for
            _log(f"a trainer gets no snapshots: {error}")
            return
        self._begin_trainer(Peer(connection, None))

    def _begin_trainer(self, peer: Peer) -> None:
        try:
            sender = CopySender(self._spec.node, self._spec.secret)
            _start_thread(self._serve_trainer, _Trainer(channel=Channel(peer), sender=sender))
        except RuntimeError as error:  # no more threads
            _log(f"a trainer gets no snapshots: {error}")
            peer.socket.close()

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
            trainer.copies.submit(trainer.sender.forget)
            for pool in (trainer.checks, trainer.copies):
                pool.shutdown(wait=False)  # what is under way is worth finishing

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
                with self._lock:
                    self._holdings[trainer.origin, message["index"]].begin(message["epoch"])
            case "fill":
                with self._lock:
                    holding = self._holdings[trainer.origin, message["index"]]
                    holding.fill(message, num_bytes=message["num_bytes"])
                    generation = holding.generation
                trainer.checks.submit(self._check, trainer, holding, generation, message)
            case "copy":
                trainer.copies.submit(self._copy, trainer, message, trainer.sender.begin())
            case "halt":
                trainer.sender.halt()
            case "store":
                self._disk_writer.submit(self._store, trainer, message)
            case "map":
                self._give_memory(trainer.channel, message)
            case _:
                self._obey_anyone(trainer.channel, message)

    def _check(self, trainer: _Trainer, holding: Holding, generation: int, message: Header) -> None:
        """Checksum a filled arena, and tell the trainer."""
        problem = ""
        try:
            self._checksum(holding, generation)
        except SupersededError:
            problem = "superseded"
        except OSError as error:
            problem = str(error)
        except BaseException as error:  # a snapshot that is never settled stops all that come after it
            _log(traceback.format_exc())
            problem = f"{type(error).__name__}: {error}"
        _reply(trainer, message, kind="kept", problem=problem)

    def _checksum(self, holding: Holding, generation: int) -> None:
        with self._lock:
            check_current(holding, generation)
            done, chunks = holding.checked, holding.chunks

        def checksum(first: int) -> list[int]:
            check_current(holding, generation)
            return checksum_parts(holding.arena, chunks[first : first + _BATCH])

        try:
            checksums = [
                one for batch in self._checksummers.map(checksum, range(0, len(chunks), _BATCH)) for one in batch
            ]
            with self._lock:
                check_current(holding, generation)
                holding.checksums = checksums
        finally:
            done.set()

    def _copy(self, trainer: _Trainer, message: Header, is_halted: Callable[[], bool]) -> None:
        """Send a copy of a filling to the peer, and tell the trainer that it may rely on it."""
        problem = ""
        with self._lock:
            holding = self._holdings.get((trainer.origin, message["index"]))
            generation = holding.generation if holding else 0
        try:
            if holding is None or holding.snapshot != Snapshot(**message["snapshot"]):
                raise SupersededError
            trainer.sender.send(holding, generation, tuple(message["peer"]), is_halted)
        except SupersededError:
            problem = "superseded"
        except OSError as error:
            problem = str(error)
        except BaseException as error:  # as for `_check`
            _log(traceback.format_exc())
            problem = f"{type(error).__name__}: {error}"
        _reply(trainer, message, kind="copied", problem=problem)

    def _store(self, trainer: _Trainer, message: Header) -> None:
        try:
            problem = self._store_all(trainer, message)
        except BaseException as error:  # as for `_check`
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
                holding.fill(about, num_bytes=about["num_bytes"])
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
                self._open_copy(channel, message)
            case "stripe":
                self._take_stripe(channel, message)
            case "seal":
                self._seal_copy(channel, message)
            case "list":
                channel.send({"kind": "list", "id": message.get("id"), "held": self._list()})
            case "read":
                self._read(channel, message)
            case "retire":
                self._retire(message["before_epoch"], message["keep_step"])
            case "measure":
                if message["waits"]:
                    self._freer.submit(lambda: None).result()  # what was let go of is free
                with self._lock:
                    in_memory = [holding for holding in self._holdings.values() if not holding.is_on_disk]
                    left = [holding for holding in in_memory if self._is_left(holding)]
                sums = {
                    "held_bytes": sum(holding.arena.num_bytes for holding in in_memory),
                    "left_bytes": sum(holding.arena.num_bytes for holding in left),
                    "copy_bytes": sum(holding.arena.num_bytes for holding in in_memory if holding.is_copy),
                }
                channel.send({"kind": "measured", "id": message.get("id"), **sums})
            case kind:
                raise WireError(f"{kind!r} is no message that a keeper knows")

    def _list(self) -> list[dict[str, Any]]:
        """Return what is here, at once; of what was filled just now the checksums are not known yet."""
        with self._lock:
            held = [holding for holding in self._holdings.values() if holding.snapshot is not None]
            return [describe(holding, self._spec.node) for holding in held]

    def _open_copy(self, channel: Channel, message: Header) -> None:
        """Make room for a copy of what another node's trainer has filled; the one that was there is void."""
        key = _get_key(message)
        capacity = int(message["capacity"])
        num_bytes, epoch = int(message["num_bytes"]), int(message["snapshot"]["epoch"])
        with self._lock:
            holding, before = self._holdings.get(key), self._incoming.pop(key, None)
            if (holding is not None and not holding.is_copy) or num_bytes > capacity:
                raise WireError(f"{key} is no copy of {num_bytes} bytes")
            if holding is not None:
                holding.begin(epoch)
        is_left = before is None or before.wait_until_left(_LEFT_S)
        if holding is not None and not (is_left and holding.arena.num_bytes >= num_bytes):
            with self._lock:
                self._drop(holding)
            holding = None
        try:
            holding = holding or self._allocate_copy(key, capacity, epoch)
        except CheckpointError as error:
            channel.send({"kind": "refused", "problem": str(error)})
            return
        with self._lock:
            incoming = Incoming(holding=holding, message=message, ticket=holding.generation)
            incoming.checksums = [None] * len(message["chunks"])
            self._incoming[key] = incoming
        channel.send({"kind": "open", "ticket": incoming.ticket})

    def _allocate_copy(self, key: tuple[str, int], num_bytes: int, epoch: int) -> Holding:
        """Return memory for a copy, if this node can spare it.

        Raises:
            CheckpointError: it cannot.
        """
        self._freer.submit(lambda: None).result()  # what was let go of is free
        with self._lock:
            copies = [holding for holding in self._holdings.values() if holding.is_copy]
            _check_memory(num_bytes, sum(copy.arena.num_bytes for copy in copies if not copy.num_bytes))
            arena = allocate_arena(num_bytes, name="copy")
            arena.populate()  # while the first bytes come
            holding = Holding(origin=key[0], index=key[1], arena=arena, is_copy=True, epoch=epoch)
            self._holdings[key] = holding
            return holding

    def _take_stripe(self, channel: Channel, message: Header) -> None:
        be_nice()  # it is this connection's thread
        self._find_incoming(message).take(channel, message)
        channel.send({"kind": "taken"})

    def _seal_copy(self, channel: Channel, message: Header) -> None:
        """Let a copy count if it has come whole."""
        incoming, problem = self._find_incoming(message), ""
        with self._lock:
            del self._incoming[_get_key(message)]
            check_current(incoming.holding, incoming.ticket)
            if incoming.checksums == message["checksums"]:
                incoming.holding.fill(incoming.message, num_bytes=int(incoming.message["num_bytes"]))
                incoming.holding.checksums = message["checksums"]
                incoming.holding.checked.set()
            else:
                problem = "the copy has other bytes than the original"
        channel.send({"kind": "refused" if problem else "pushed", "problem": problem})

    def _find_incoming(self, message: Header) -> Incoming:
        with self._lock:
            incoming = self._incoming.get(_get_key(message))
        if incoming is None or incoming.ticket != message["ticket"]:
            raise SupersededError
        return incoming

    def _read(self, channel: Channel, message: Header) -> None:
        """Send bytes of a holding, and their checksum if that is asked for: where none was taken yet."""
        holding = self._find(message)
        if holding is None:
            channel.send({"kind": "missing", "id": message.get("id")})
            return
        start, size = int(message["start"]), int(message["size"])
        if not 0 <= start <= start + size <= holding.num_bytes:
            raise WireError(f"bytes {start} to {start + size} are outside of {holding.num_bytes}")
        generation, answer = holding.generation, {"kind": "data", "id": message.get("id")}
        if message["sums"]:
            summed = SummedPieces(holding.arena, start, size, check=partial(check_current, holding, generation))
            channel.send(answer, summed, num_bytes=size)
            channel.send({"kind": "sum", "crc32": summed.crc32})
        else:
            check = partial(check_current, holding, generation)
            channel.send_file(answer, holding.arena.descriptor, [(start, size)], check=check)

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


def _get_key(message: Header) -> tuple[str, int]:
    return str(message["origin"]), int(message["index"])


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


def _reply(trainer: _Trainer, message: Header, *, kind: str, **fields: object) -> None:
    with contextlib.suppress(WireError):  # it is gone; nobody is left to tell
        trainer.channel.send({"kind": kind, "id": message["id"], **fields})


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
    listener = _listen(spec.ip, spec.port) if spec.ip else None
    try:
        owner.send({"kind": "ready", "port": listener.getsockname()[1] if listener else 0})
        Keeper(spec, owner).serve(listener)
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # threads may be in the middle of a write that nobody waits for


if __name__ == "__main__":
    main()
