"""The host: one daemon per node and run. It is warm with torch, forks trainers in milliseconds and outlives agents.

Started as ``python -m cluster.runtime.host`` with a `HostSpec` as JSON on standard input, by a Ray task on its node.
It leaves that process behind, tells it once it listens, and is

- single-threaded, because only such a process may fork safely: one selector loop, no torch call that starts a thread;
- warm: torch, the model code and FSDP have been imported and used once, with a fake process group;
- a parent: its trainers die with it (PR_SET_PDEATHSIG), and their end is known at once (pidfd); the keeper of its
  snapshots, which outlives them, dies with it too;
- a tenant: it ends with its raylet, with its last lease, or without a coordinator for half as long.

Agents claim slots, and each claimed slot has a trainer that is warm and waits; the coordinator, over TCP, decides which
of them join a world. A slot is leased: an agent's hold renews the lease, and so does the coordinator for as long as it
expects another agent, however long Ray Train takes to form its group. Without either it runs out after `lease_s`, so
nothing stays on a node whose cluster is dead. A trainer outlives its worlds; where one has died, the next is forked.
Ray is never imported here.

A coordinator that dies leaves all of this as it is: the world trains on until another one has taken the seat. That one
is told who is here once the trainers have left the world that it does not know.
"""

import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from cluster.runtime.coordinator_link import CoordinatorLink
from cluster.runtime.daemon import Starter, detach, take_folder, write_to
from cluster.runtime.forked import Trainer, fork_trainer
from cluster.runtime.link import Link, Message, listen
from cluster.runtime.priority import AHEAD, take_priority_of
from cluster.runtime.seat import Seat, tell_seat
from cluster.types import get_leave_limit_s
from elastic.checkpoint.keeping import KeeperProcess, start_keeper

BEAT_S = 1.0
_RETRY_S = 0.2
_SPARE_AFTER_STEPS = 20
"""A spare trainer rehearses beside one that trains. By then that one has all the GPU memory that it needs."""


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """What a host must know to start; JSON on its standard input, so that the secret is in no process list."""

    node: str
    node_ip: str
    folder: str
    """Socket, lock and logs of this host, which makes it and removes it when it ends."""
    seat: Seat
    """Of its coordinator."""
    raylet_pid: int
    secret: str
    """The coordinator knows it, and whoever follows it."""
    lease_s: float
    config: dict[str, Any]
    """What its trainers train, as `dataclasses.asdict` made it."""
    disk: str = ""
    """Folder of this run on a disk of the node's own, for snapshots; empty: there is none."""


@dataclass(kw_only=True)
class Place:
    """One slot: who claims it and what runs in it."""

    name: str
    env: dict[str, str]
    group: int
    agent: Link | None
    renewed_s: float = 0.0
    """Without an agent, the last renewal of its lease (`Host.awake_s`)."""
    trainer: Trainer | None = None
    spare: Trainer | None = None
    """Takes the trainer's place when that dies."""
    has_spares: bool = True
    """Until one has ended by itself."""
    claim: Message | None = None
    """What the coordinator is told of the newest claim, once the trainer is warm and in no world of another's."""
    is_told: bool = False
    has_forked: bool = False
    """It has had a trainer."""

    def get_holder(self) -> Message | None:
        """Return the worker group of the agent that holds it, and the group's size; None without an agent."""
        if self.agent is None:
            return None
        assert self.claim is not None  # an agent comes with one
        return {"group": self.group, "group_size": self.claim["group_size"]}


@dataclass(kw_only=True)
class Host:
    """The daemon's state; `serve` is its life."""

    spec: HostSpec
    raylet_pidfd: int
    listener: socket.socket
    keeper: KeeperProcess | None
    """None: snapshots are not kept in memory."""
    coordinator: CoordinatorLink = field(init=False)
    places: dict[str, Place] = field(default_factory=dict[str, Place])
    selector: selectors.EpollSelector = field(default_factory=selectors.EpollSelector)
    awake_s: float = 0.0
    """Seconds in which this process ran: it must not take its own sleep for the silence of others."""
    renewed_s: float = 0.0
    """When the coordinator last renewed leases, by that clock; one without slots has it renew its own."""

    def __post_init__(self) -> None:
        """Look for its coordinator from now on."""
        self.coordinator = CoordinatorLink(
            self.spec.seat,
            patience_s=self.spec.lease_s / 2,
            get_hello=self._get_hello,
            on_asked=lambda link: self._watch(link, self._hear_coordinator),
            on_lost=self._lose_coordinator,
        )

    def serve(self) -> NoReturn:
        """Serve agents, trainers and the coordinator until one of the reasons to end comes up."""
        try:
            self._serve()
        except Exception:
            self.end(f"it failed\n{traceback.format_exc()}")

    def _serve(self) -> NoReturn:
        self._watch(self.listener, self._accept)
        self._watch(self.raylet_pidfd, lambda: self.end("its raylet ended"))
        next_beat_s, last_s = 0.0, time.monotonic()
        while True:
            for key, _ in self.selector.select(timeout=BEAT_S / 4):
                if self.selector.get_map().get(key.fd) is key:  # an earlier event of this round may have closed it
                    key.data()
            now_s = time.monotonic()
            if not self.coordinator.is_led:
                if reason := self.coordinator.look():
                    self.end(reason)
            elif now_s >= next_beat_s:
                next_beat_s = now_s + BEAT_S
                self._beat()
            self.awake_s += min(now_s - last_s, BEAT_S)
            last_s = now_s
            self._expire_leases()
            self._end_stragglers(now_s)
            self._tell_silent()

    def end(self, reason: str) -> NoReturn:
        """End the trainers, tell the agents, remove every trace and exit."""
        _log(f"host ends: {reason}")
        for place in self.places.values():
            for trainer in filter(None, (place.trainer, place.spare)):
                trainer.kill()
                os.waitpid(trainer.pid, 0)
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
            elif message["kind"] == "seat":
                self.coordinator.take_seat(Seat(**message["seat"]))
            elif message["kind"] == "abandoned" and not self.coordinator.is_led:  # by who starts hosts for the run anew
                self.end("its coordinator ended, and the run has other hosts by now")

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
        place.claim = {"slot": name, "group": group, "group_size": message["group_size"], "pid": message["pid"]}
        place.is_told = False
        if place.trainer is None:
            self._provide_trainer(place)
        else:
            self._tell_claim(place)

    def _tell_claim(self, place: Place) -> None:
        """Tell a claim that is news, unless its trainer could not join a world yet."""
        trainer = place.trainer
        is_busy = trainer is not None and (not trainer.is_warm or trainer.leave_until_s is not None)
        if place.claim and not place.is_told and not is_busy:
            place.is_told = self.coordinator.tell("claimed", **place.claim)

    def _pick_slot(self, group: int) -> str:
        """Return the first slot that no agent of this group holds (without GPUs, one slot is as good as another)."""
        free = [name for name, place in sorted(self.places.items()) if place.agent is None or place.group < group]
        return free[0] if free else f"cpu{len(self.places)}"

    def _release(self, place: Place) -> None:
        place.agent, place.renewed_s = None, self.awake_s

    def _renew_leases(self, slots: Collection[str]) -> None:
        self.renewed_s = self.awake_s
        for place in self.places.values():
            if place.name in slots:
                place.renewed_s = self.awake_s

    def _expire_leases(self) -> None:
        """End what nobody holds and nobody expects an agent for; with its last slot, the host and its snapshots."""
        oldest_s = self.awake_s - self.spec.lease_s
        expired = [place for place in self.places.values() if place.agent is None and place.renewed_s < oldest_s]
        for place in expired:
            self.coordinator.tell("expired", slot=place.name)
            self._end_trainer(place)
            self._end_spare(place)
            del self.places[place.name]
        if not self.places and (expired or self.renewed_s < oldest_s):
            self.end(f"nobody has renewed its lease for {self.spec.lease_s:g} s")

    # ---- coordinator

    def _get_hello(self) -> Message:
        address = (self.spec.node_ip, self.keeper.port) if self.keeper else None
        return {"node": self.spec.node, "secret": self.spec.secret, "pid": os.getpid(), "keeper": address}

    def _enter_service(self, now_s: float) -> None:
        """Have the trainers leave a world that this coordinator does not know, and tell it who is here."""
        for place in self.places.values():
            place.is_told = False
            trainer = place.trainer
            if trainer and trainer.attempt is not None:
                uses_gpus = bool(self.spec.config["cluster"]["gpus_per_worker"])
                trainer.leave_until_s = now_s + get_leave_limit_s(uses_gpus=uses_gpus)
                trainer.link.send("leave", attempt=trainer.attempt)
            self._tell_claim(place)

    def _lose_coordinator(self, link: Link) -> None:
        if self.coordinator.is_led:
            _log("the coordinator is gone")
        self._unwatch(link)

    def _end_stragglers(self, now_s: float) -> None:
        """End trainers that do not leave the world of a coordinator that is gone; others take their places."""
        for place in self.places.values():
            trainer = place.trainer
            if trainer and trainer.leave_until_s is not None and now_s > trainer.leave_until_s and not trainer.killed:
                trainer.kill()

    def _beat(self) -> None:
        """Give a sign of life, and say whose agents hold the slots now."""
        holders = {place.name: place.get_holder() for place in self.places.values()}
        self.coordinator.tell("beat", holders=holders)

    def _hear_coordinator(self) -> None:
        for message in self.coordinator.receive():
            if message["kind"] == "welcome":
                self._enter_service(time.monotonic())
                continue
            if message["kind"] == "end":
                if message["forget"]:
                    shutil.rmtree(self.spec.disk, ignore_errors=True)
                self.end(message["reason"])
            if message["kind"] == "renew":
                self._renew_leases(message["slots"])
                continue
            place = self.places.get(message["slot"])
            trainer = place.trainer if place else None
            if message["kind"] == "join":
                if place is None:  # its lease ran out while the message was on its way
                    self._tell_ended(message["slot"], message["attempt"], "crashed", "its slot is gone")
                else:
                    self._join(place, message["attempt"])
            elif trainer and trainer.attempt == message["attempt"]:
                if message["kind"] == "kill":
                    trainer.kill()
                else:  # go, park, leave
                    trainer.link.send(**message)

    # ---- trainers

    def _join(self, place: Place, attempt: int) -> None:
        """Let the slot's trainer take part in the next world, or one in its place."""
        self._replace_dead_keeper()
        trainer = place.trainer
        # one that the coordinator lost track of (two must never share a slot), or that hangs on a dead keeper
        if trainer is not None and (trainer.attempt is not None or trainer.keeper is not self.keeper):
            self._end_trainer(place)
        if place.trainer is None:
            self._provide_trainer(place)
        trainer = place.trainer
        assert trainer is not None
        trainer.attempt, trainer.step, trainer.num_steps = attempt, 0, 0
        trainer.link.send("join", attempt=attempt)

    def _replace_dead_keeper(self) -> None:
        """Start another keeper if there was one; trainers that hang on the dead one train on without snapshots."""
        if self.keeper is None or self.keeper.process.poll() is None:
            return
        _log("the keeper is gone; its snapshots with it")
        self.keeper = _start_keeper(self.spec)
        self.coordinator.tell("keeper", address=(self.spec.node_ip, self.keeper.port))

    def _provide_trainer(self, place: Place) -> None:
        """Give a slot that has none a trainer: its spare, if that is ready, else one that is forked now."""
        self._replace_dead_keeper()
        spare = place.spare
        if spare and spare.is_warm and spare.keeper is self.keeper:
            place.trainer, place.spare = spare, None
            return
        self._end_spare(place)
        # one that replaces another is waited for
        place.trainer = self._fork(place, rehearses="not" if place.has_forked else "fully")
        place.has_forked = True

    def _fork(self, place: Place, *, rehearses: Literal["fully", "sparingly", "not"]) -> Trainer:
        from cluster.runtime import trainer as life  # noqa: PLC0415 (loaded by warm_up; torch stays out of host start-up errors)

        spec = self.spec

        def run(link: Link, keeper: socket.socket | None) -> None:
            life.run(
                link,
                spec.config,
                node=spec.node,
                node_ip=spec.node_ip,
                keeper=keeper,
                secret=spec.secret,
                folder=Path(spec.folder),
                rehearses=rehearses,
            )

        trainer = fork_trainer(
            run,
            keeper=self.keeper,
            env=place.env,
            log=self._get_log(place.name),
            inherited=[self.selector.fileno(), *(key.fd for key in self.selector.get_map().values())],
        )
        self._watch(trainer.link, lambda: self._hear_trainer(place, trainer))
        self._watch(trainer.pidfd, lambda: self._reap_spare(place) if trainer is place.spare else self._reap(place))
        return trainer

    def _fork_spare(self, place: Place) -> None:
        """Have a process ready, with device and compiled code, for when the trainer of a slot dies."""
        self._replace_dead_keeper()
        place.spare = self._fork(place, rehearses="sparingly")

    def _reap_spare(self, place: Place) -> None:
        """Do without spares in a slot whose spare ends by itself: its GPU may allow one process only."""
        self._end_spare(place)
        place.has_spares = False
        _log(f"the spare trainer of {place.name} ended; it gets no other")

    def _end_spare(self, place: Place) -> None:
        spare, place.spare = place.spare, None
        if spare is None:
            return
        spare.kill()
        os.waitpid(spare.pid, 0)
        self._unwatch(spare.pidfd)
        if spare.is_talking:
            self._unwatch(spare.link)

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
            if message["kind"] == "stepped":
                trainer.num_steps += 1
                if trainer.num_steps == _SPARE_AFTER_STEPS and self._wants_spare(place):
                    self._fork_spare(place)
            match message["kind"]:
                case "warm":
                    trainer.is_warm = True
                    if trainer is place.spare:
                        _log(f"the spare trainer of {place.name} is ready")
                    self._tell_claim(place)
                case "outcome" if message["stays"]:
                    attempt, trainer.attempt, trainer.heard_s = trainer.attempt, None, None
                    trainer.leave_until_s = None
                    assert attempt is not None
                    self._tell_ended(place.name, attempt, message["outcome"], message["reason"], message["exit_code"])
                    self._tell_claim(place)
                case "outcome":
                    trainer.said = message
                case "alive":
                    pass
                case _:
                    self.coordinator.tell("trainer", slot=place.name, attempt=trainer.attempt, message=message)

    def _tell_silent(self) -> None:
        """Complain in the name of trainers that cannot."""
        silent_s: float = self.spec.config["fault"]["silent_s"]
        for place in self.places.values():
            trainer = place.trainer
            if trainer is None or trainer.heard_s is None or trainer.said:
                continue
            if self.awake_s - trainer.heard_s > silent_s:
                trainer.heard_s = self.awake_s  # the next complaint waits as long
                _log(f"the trainer of {place.name} is frozen: no sign of life for {silent_s:g} s")
                stall = {"kind": "stalled", "step": trainer.step, "where": "silent", "waited_s": silent_s}
                self.coordinator.tell("trainer", slot=place.name, attempt=trainer.attempt, message=stall)

    def _wants_spare(self, place: Place) -> bool:
        """Tell whether a trainer that is forked when it is needed would be slow: where code is compiled."""
        config = self.spec.config
        is_wanted = config["compile"] and config["cluster"]["spare_trainers"]
        return is_wanted and place.has_spares and place.spare is None

    def _end_trainer(self, place: Place) -> None:
        """End a slot's trainer, if it has one; none takes its place."""
        if place.trainer:
            place.trainer.kill()
            self._reap(place, then="nothing")

    def _reap(self, place: Place, *, then: Literal["replace", "nothing"] = "replace") -> None:
        """Book a trainer's end, after all that it has still said; one that had a world is replaced at once."""
        trainer = place.trainer
        assert trainer is not None
        while trainer.is_talking:
            self._hear_trainer(place, trainer)
        _, status = os.waitpid(trainer.pid, 0)
        self._unwatch(trainer.pidfd)
        place.trainer = None
        code = os.waitstatus_to_exitcode(status)
        attempt, said = trainer.attempt, trainer.said
        if place.agent:
            place.agent.send("exited", pid=trainer.pid, code=code, attempt=attempt)
        if attempt is None:
            _log(f"the trainer of {place.name} ended with {code} while it waited for a world")
            self._tell_claim(place)  # the next one is forked when it is needed, and what ends that one is told
            return
        if said:
            self._tell_ended(place.name, attempt, said["outcome"], said["reason"], said["exit_code"])
        elif trainer.killed:
            self._tell_ended(place.name, attempt, "killed", "ended by its coordinator")
        else:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self._tell_ended(place.name, attempt, "crashed", f"trainer ended with {how}")
        if then == "replace":
            if not said:
                self._provide_trainer(place)
            self._tell_claim(place)

    def _tell_ended(self, slot: str, attempt: int, outcome: str, reason: str, exit_code: int = 1) -> None:
        self.coordinator.tell("ended", slot=slot, attempt=attempt, outcome=outcome, reason=reason, exit_code=exit_code)

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


def _start_keeper(spec: HostSpec) -> KeeperProcess:
    return start_keeper(node=spec.node, ip=spec.node_ip, secret=spec.secret, disk=spec.disk)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201 (the daemon's own log file)


def main() -> None:
    """Become the host of the node that the spec on standard input names, or tell the one that is there of the seat."""
    fields: dict[str, Any] = json.load(sys.stdin)
    spec = HostSpec(seat=Seat(**fields.pop("seat")), **fields)
    folder = Path(spec.folder)
    detach()
    starter = Starter()
    while not take_folder(folder):
        if tell_seat(folder, spec.seat):
            starter.tell_ready()
            return
        time.sleep(_RETRY_S)  # it warms up
    try:
        write_to(folder / "host.log")
        host = _start(spec, folder)
        starter.tell_ready()
        host.serve()
    except BaseException:
        starter.tell_failure()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _start(spec: HostSpec, folder: Path) -> Host:
    """Warm up and open the door to agents."""
    raylet_pidfd = os.pidfd_open(spec.raylet_pid)  # fails if the node is going down already
    if not (take_priority_of(spec.raylet_pid, ahead=AHEAD) or take_priority_of(spec.raylet_pid)):
        _log(f"trainers run at niceness {os.nice(0)}, as Ray's workers do; RAY_worker_niceness=0 for the raylet helps")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # a thread pool would make forking unsafe; trainers set their own number
    # torch asks whether there is a GPU when it builds a mesh, even of CPUs. By default that opens the driver, and no
    # child of a process that did can use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TORCH_WARM_POOL"] = "0"  # inductor's processes and threads belong to the trainer that compiles
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the allocator that pyarrow brings starts one
    started_s = time.monotonic()
    from cluster.runtime import trainer  # noqa: PLC0415 (torch: after the fork, with the thread count set)

    trainer.rehearsal.warm_up()
    gc.collect()
    gc.freeze()  # trainers share these pages, and a collection in them never walks torch again
    num_threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    _log(f"warm after {time.monotonic() - started_s:.1f} s with {num_threads} thread(s)")
    is_keeping = spec.config["checkpoint"]["memory"] != "off"
    keeper = _start_keeper(spec) if is_keeping else None
    return Host(spec=spec, raylet_pidfd=raylet_pidfd, listener=listen(folder), keeper=keeper)


if __name__ == "__main__":
    main()
