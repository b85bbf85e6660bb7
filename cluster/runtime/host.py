"""The host: one daemon per node and run. It is warm with torch, forks trainers in milliseconds and outlives agents.

Started as ``python -m cluster.runtime.host`` with a `HostSpec` as JSON on standard input, by a Ray task on its node.
It leaves that process behind (double fork and a session of its own: all that Ray 2.60 spares when a worker ends) and is

- single-threaded, because only such a process may fork safely: one selector loop, no torch call that starts a thread;
- warm: torch, the model code and FSDP have been imported and used once, with a fake process group;
- a parent: its trainers die with it (PR_SET_PDEATHSIG), and their end is known at once (pidfd);
- a tenant: it ends with its raylet, with its coordinator, or when no agent has claimed a slot for `lease_s`.

Agents claim slots; the coordinator, over TCP, decides what runs in them. Ray is never imported here.
"""

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cluster.runtime.link import Link, Message

BEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """What a host must know to start; JSON on its standard input, so that the secret is in no process list."""

    node: str
    node_ip: str
    folder: str
    """Socket, lock and logs of this host; removed when it ends."""
    raylet_pid: int
    coordinator_host: str
    coordinator_port: int
    secret: str
    lease_s: float


@dataclass(kw_only=True)
class Trainer:
    """A forked trainer, as its parent sees it."""

    pid: int
    pidfd: int
    link: Link
    attempt: int
    silent_s: float
    """It is frozen if it says nothing for so long, once it has begun to give signs of life."""
    heard_s: float | None = None
    step: int = 0
    """The last one it told."""
    is_talking: bool = True
    """Its end of the link is open; what it sent may still lie there after its death."""
    said: Message | None = None
    """Its last word about how it ended."""
    killed: bool = False


@dataclass(kw_only=True)
class Place:
    """One slot: who claims it and what runs in it."""

    name: str
    env: dict[str, str]
    group: int
    agent: Link | None
    unclaimed_since_s: float = 0.0
    trainer: Trainer | None = None


@dataclass(kw_only=True)
class Host:
    """The daemon's state; `serve` is its life."""

    spec: HostSpec
    raylet_pidfd: int
    coordinator: Link
    listener: socket.socket
    places: dict[str, Place] = field(default_factory=dict[str, Place])
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    unclaimed_since_s: float = field(default_factory=time.monotonic)
    awake_s: float = 0.0
    """Seconds in which this process ran: it must not take its own sleep for its trainers' silence."""

    def serve(self) -> NoReturn:
        """Serve agents, trainers and the coordinator until one of the reasons to end comes up."""
        self._watch(self.listener, self._accept)
        self._watch(self.coordinator, self._hear_coordinator)
        self._watch(self.raylet_pidfd, lambda: self.end("its raylet ended"))
        next_beat_s, last_s = 0.0, time.monotonic()
        while True:
            for key, _ in self.selector.select(timeout=BEAT_S / 4):
                if key.fd in self.selector.get_map():  # an earlier event of this round may have closed it
                    key.data()
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                next_beat_s = now_s + BEAT_S
                if not self.coordinator.send("beat"):
                    self.end("its coordinator ended")
            self.awake_s += min(now_s - last_s, BEAT_S)
            last_s = now_s
            self._expire_leases(now_s)
            self._tell_silent()

    def end(self, reason: str) -> NoReturn:
        """End the trainers, tell the agents, remove every trace and exit."""
        _log(f"host ends: {reason}")
        for place in self.places.values():
            if place.trainer:
                os.kill(place.trainer.pid, signal.SIGKILL)
                os.waitpid(place.trainer.pid, 0)
            if place.agent:
                place.agent.send("bye", reason=reason)
        shutil.rmtree(self.spec.folder, ignore_errors=True)
        os._exit(0)

    # ---- agents

    def _accept(self) -> None:
        agent = Link(self.listener.accept()[0])
        self._watch(agent, lambda: self._hear_agent(agent))

    def _hear_agent(self, agent: Link) -> None:
        messages = agent.receive()
        if messages is None:
            self._unwatch(agent)
            for place in self.places.values():
                if place.agent is agent:
                    self._release(place)
            return
        for message in messages:
            if message["kind"] == "claim":
                self._claim(agent, message)

    def _claim(self, agent: Link, message: Message) -> None:
        """Give the agent its slot; an agent of an older worker group than the slot's last one is refused."""
        group: int = message["group"]
        name = message["slot"] or self._pick_slot(group)
        place = self.places.get(name)
        if place and group < place.group:
            agent.send("fenced", by=place.group)
            return
        if place is None:
            place = self.places[name] = Place(name=name, env={}, group=group, agent=None)
        if place.agent:
            place.agent.send("fenced", by=group)
        place.group, place.agent, place.env = group, agent, message["env"]
        trainer_pid = place.trainer.pid if place.trainer else None
        agent.send("claimed", slot=name, trainer_pid=trainer_pid, log=str(self._get_log(name)))
        self.coordinator.send("claimed", slot=name, group=group, group_size=message["group_size"], pid=message["pid"])

    def _pick_slot(self, group: int) -> str:
        """Return the first slot that no agent of this group holds (without GPUs, one slot is as good as another)."""
        free = [name for name, place in sorted(self.places.items()) if place.agent is None or place.group < group]
        return free[0] if free else f"cpu{len(self.places)}"

    def _release(self, place: Place) -> None:
        place.agent, place.unclaimed_since_s = None, time.monotonic()
        if all(p.agent is None for p in self.places.values()):
            self.unclaimed_since_s = time.monotonic()

    def _expire_leases(self, now_s: float) -> None:
        expired = [
            place
            for place in self.places.values()
            if place.agent is None and now_s - place.unclaimed_since_s > self.spec.lease_s
        ]
        for place in expired:
            self.coordinator.send("expired", slot=place.name)
            if place.trainer:
                self._kill(place.trainer)
                self._reap(place)
            del self.places[place.name]
        if not self.places and now_s - self.unclaimed_since_s > self.spec.lease_s:
            self.end(f"no agent for {self.spec.lease_s:g} s")

    # ---- coordinator

    def _hear_coordinator(self) -> None:
        messages = self.coordinator.receive()
        if messages is None:
            self.end("its coordinator ended")
        for message in messages:
            if message["kind"] == "end":
                self.end(message["reason"])
            place = self.places.get(message["slot"])
            trainer = place.trainer if place else None
            if message["kind"] == "fork":
                if place is None:  # its lease ran out while the message was on its way
                    self._tell_ended(message["slot"], message["attempt"], "crashed", "its slot is gone")
                else:
                    self._fork(place, message)
            elif trainer and trainer.attempt == message["attempt"]:
                if message["kind"] == "kill":
                    self._kill(trainer)
                else:  # go, park
                    trainer.link.send(**message)

    # ---- trainers

    def _fork(self, place: Place, message: Message) -> None:
        if place.trainer:  # the coordinator lost track of it; two trainers must never share a slot
            self._kill(place.trainer)
            self._reap(place)
        ours, theirs = socket.socketpair()
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become_trainer(place, Link(theirs), message, parent_pid)
        theirs.close()
        trainer = Trainer(
            pid=pid,
            pidfd=os.pidfd_open(pid),
            link=Link(ours),
            attempt=message["attempt"],
            silent_s=message["config"]["fault"]["silent_s"],
        )
        place.trainer = trainer
        self._watch(trainer.link, lambda: self._hear_trainer(place, trainer))
        self._watch(trainer.pidfd, lambda: self._reap(place))

    def _become_trainer(self, place: Place, link: Link, message: Message, parent_pid: int) -> NoReturn:
        """Turn the forked child into a trainer: nothing of the host's is left open, and it dies with the host."""
        from cluster.runtime import trainer  # noqa: PLC0415 (loaded by warm_up; torch stays out of host start-up errors)

        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent_pid:
                os._exit(1)
            for key in list(self.selector.get_map().values()):
                with contextlib.suppress(OSError):
                    os.close(key.fd)
            self.selector.close()
            log = os.open(self._get_log(place.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(place.env)
            trainer.run(link, message, node=self.spec.node, node_ip=self.spec.node_ip)
            code = 0
        except BaseException:
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _hear_trainer(self, place: Place, trainer: Trainer) -> None:
        messages = trainer.link.receive()
        if messages is None:
            trainer.is_talking = False
            self._unwatch(trainer.link)
            return
        for message in messages:
            trainer.heard_s = self.awake_s if message["kind"] == "alive" else trainer.heard_s
            if message["kind"] in ("restored", "stepped"):
                trainer.step = message["progress"]["step"]
            if message["kind"] == "outcome":
                trainer.said = message
            elif message["kind"] != "alive":
                self.coordinator.send("trainer", slot=place.name, attempt=trainer.attempt, message=message)

    def _tell_silent(self) -> None:
        """Complain in the name of trainers that cannot."""
        for place in self.places.values():
            trainer = place.trainer
            if trainer is None or trainer.heard_s is None or trainer.said:
                continue
            if self.awake_s - trainer.heard_s > trainer.silent_s:
                trainer.heard_s = self.awake_s  # the next complaint waits as long
                _log(f"the trainer of {place.name} is frozen: no sign of life for {trainer.silent_s:g} s")
                stall = {"kind": "stalled", "step": trainer.step, "where": "silent", "waited_s": trainer.silent_s}
                self.coordinator.send("trainer", slot=place.name, attempt=trainer.attempt, message=stall)

    def _kill(self, trainer: Trainer) -> None:
        trainer.killed = True
        os.kill(trainer.pid, signal.SIGKILL)

    def _reap(self, place: Place) -> None:
        """Book a trainer's end, after all that it has still said."""
        trainer = place.trainer
        assert trainer is not None
        while trainer.is_talking:
            self._hear_trainer(place, trainer)
        _, status = os.waitpid(trainer.pid, 0)
        self._unwatch(trainer.pidfd)
        place.trainer = None
        code = os.waitstatus_to_exitcode(status)
        if place.agent:
            place.agent.send("exited", pid=trainer.pid, code=code, attempt=trainer.attempt)
        said = trainer.said
        if said:
            reason, exit_code = said["reason"], said["exit_code"]
            self._tell_ended(place.name, trainer.attempt, said["outcome"], reason, exit_code)
        elif trainer.killed:
            self._tell_ended(place.name, trainer.attempt, "killed", "ended by its coordinator")
        else:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self._tell_ended(place.name, trainer.attempt, "crashed", f"trainer ended with {how}")

    def _tell_ended(self, slot: str, attempt: int, outcome: str, reason: str, exit_code: int = 1) -> None:
        self.coordinator.send("ended", slot=slot, attempt=attempt, outcome=outcome, reason=reason, exit_code=exit_code)

    # ---- plumbing

    def _get_log(self, slot: str) -> Path:
        return Path(self.spec.folder) / f"{slot}.log"

    def _watch(self, source: Any, on_ready: Any) -> None:
        self.selector.register(source, selectors.EVENT_READ, on_ready)

    def _unwatch(self, source: Link | int) -> None:
        self.selector.unregister(source)
        if isinstance(source, Link):
            source.close()
        else:
            os.close(source)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201 (the daemon's own log file)


def _daemonize() -> None:
    """Leave the starting process, its session and its group behind."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def main() -> None:
    """Become the host of the node that the spec on standard input names; do nothing if there is one already."""
    spec = HostSpec(**json.load(sys.stdin))
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _daemonize()
    lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os._exit(0)
    try:
        _start(spec, folder).serve()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _start(spec: HostSpec, folder: Path) -> Host:
    """Warm up, report to the coordinator and open the door to agents."""
    raylet_pidfd = os.pidfd_open(spec.raylet_pid)  # fails if the node is going down already
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # a thread pool would make forking unsafe; trainers set their own number
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the allocator that pyarrow brings starts one
    started_s = time.monotonic()
    from cluster.runtime import trainer  # noqa: PLC0415 (torch: after the fork, with the thread count set)

    trainer.warm_up()
    gc.collect()
    gc.freeze()  # trainers share these pages, and a collection in them never walks torch again
    num_threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    _log(f"warm after {time.monotonic() - started_s:.1f} s with {num_threads} thread(s)")
    connection = socket.create_connection((spec.coordinator_host, spec.coordinator_port), timeout=10)
    coordinator = Link(connection)
    coordinator.send("host", node=spec.node, secret=spec.secret, pid=os.getpid())
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        (folder / "socket").unlink()
    listener.bind(str(folder / "socket"))
    listener.listen()
    return Host(spec=spec, raylet_pidfd=raylet_pidfd, coordinator=coordinator, listener=listener)


if __name__ == "__main__":
    main()
