"""The host: one daemon per node and run. It is warm with torch, forks trainers in milliseconds and outlives agents.

Started as ``python -m cluster.runtime.node.host`` with a `HostSpec` as JSON on standard input, by a Ray task on its
node. It leaves that process behind, tells it once it listens, and is

- single-threaded, because only such a process may fork safely: one selector loop, no torch call that starts a thread;
- warm: torch, the model code and FSDP have been imported and used once, with a fake process group;
- a parent: its trainers die with it (PR_SET_PDEATHSIG), and their end is known at once (pidfd); the replica server,
  which holds their snapshots and outlives them, dies with it too;
- a tenant: it ends with its raylet, with its last lease, or without a coordinator for half as long.

Agents claim slots, and each claimed slot has a trainer that is warm and waits; the coordinator, over TCP, decides which
of them join a world. A slot is leased: an agent's hold renews the lease, and so does the coordinator for as long as it
expects another agent, however long Ray Train takes to form its group. Without either it runs out after `lease_s`, so
nothing stays on a node whose cluster is dead. A trainer outlives its worlds; where one has died, the next is forked.
Ray is never imported here.

A coordinator that dies leaves all of this as it is: the world trains on until another one has taken its place. That one
is told who is here once the trainers have left the world that it does not know.
"""

import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, assert_never

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import (
    TO_HOST_FROM_NODE,
    Abandoned,
    Beat,
    Bye,
    Claim,
    ClaimGranted,
    CoordinatorMessage,
    CoordinatorMoved,
    End,
    Fenced,
    HostHello,
    HostMessage,
    Renew,
    ReplicaServersTold,
    RowsKept,
    Welcome,
)
from cluster.runtime.node.connect import tell_address
from cluster.runtime.node.coordinator_link import CoordinatorLink
from cluster.runtime.node.daemon import Starter, detach, log, take_folder, write_to
from cluster.runtime.node.host_spec import HostSpec
from cluster.runtime.node.priority import get_ahead, take_priority_of
from cluster.runtime.trainers.slots import AgentLink, Place, Trainers
from cluster.types import Claimed, Expired, Go, Join, Kill, Leave, Park, Slot
from elastic.paths import ensure_home
from elastic.transport import Acceptor, Link, listen_unix

BEAT_S = 1.0
_TURN_S = 0.05
"""A trainer that dies is noticed so soon; to look takes a fiftieth of a millisecond."""
_RETRY_S = 0.2
_END_S = 2.0
"""For its trainers to end with it, so that their devices are free. One that does not is left behind."""


class Host:
    """The daemon; `serve` is its life.

    Args:
        raylet_pidfd: readable once the raylet has ended.
        live: a trainer's life.
    """

    def __init__(self, spec: HostSpec, raylet_pidfd: int, live: Callable[..., None]) -> None:
        self.spec = spec
        self.places: dict[str, Place] = {}
        self.replica_servers: ReplicaServersTold | None = None
        """For the trainers of the newest world."""
        self.retired: dict[str, Place] = {}
        """Those whose lease has run out. What runs there may take its time to end, and is in the way of another."""
        self.loop = EventLoop()
        self.renewed_s = 0.0
        """When the coordinator last renewed leases (`EventLoop.awake_s`); one without slots has it renew its own."""
        # its replica server takes its time
        self.trainers = Trainers(spec, self.loop, tell=self._tell, live=live)
        self.coordinator = CoordinatorLink(
            spec.coordinator_address,
            secret=spec.secret,
            loop=self.loop,
            patience_s=spec.lease_s / 2,
            get_hello=self._get_hello,
            on_message=self._hear_coordinator,
            on_lost=lambda: log("the coordinator is gone"),
            say=log,
        )
        self.acceptor = Acceptor(listen_unix(Path(spec.folder)), say=log, secret=None)
        self.loop.watch(self.acceptor, self._accept)
        self.loop.watch(raylet_pidfd, lambda: self.end("its raylet ended"))

    def serve(self) -> NoReturn:
        """Serve agents, trainers and the coordinator until one of the reasons to end comes up."""
        try:
            self._serve()
        except Exception:
            self.end(f"it failed\n{traceback.format_exc()}")

    def _serve(self) -> NoReturn:
        next_beat_s = 0.0
        while True:
            self.loop.turn(_TURN_S)
            self._accept()
            now_s = time.monotonic()
            if not self.coordinator.is_led:
                if reason := self.coordinator.look():
                    self.end(reason)
            elif now_s >= next_beat_s:
                next_beat_s = now_s + BEAT_S
                self._beat()
            self._expire_leases()
            self.trainers.check_replica_server()
            for place in self.places.values():
                self.trainers.check(place)

    def end(self, reason: str) -> NoReturn:
        """End the trainers, tell the agents, remove every trace and exit."""
        log(f"host ends: {reason}")
        places = [*self.places.values(), *self.retired.values()]
        for place in places:
            if place.agent:
                place.agent.send(Bye(reason=reason))
        self.trainers.end_all(places, limit_s=_END_S)
        shutil.rmtree(self.spec.folder, ignore_errors=True)
        os._exit(0)

    # ---- agents

    def _accept(self) -> None:
        for peer in self.acceptor.turn():
            agent = Link(peer, TO_HOST_FROM_NODE, sends="at once")
            self.loop.watch(agent, lambda agent=agent: self._hear_agent(agent))

    def _hear_agent(self, agent: AgentLink) -> None:
        messages = agent.receive()
        if messages is None:
            if agent.fault:
                log(f"a connection of this node was ended: {agent.fault}")
            self.loop.unwatch(agent)
            for place in self.places.values():
                if place.agent is agent:
                    self._release(place)
            return
        for message in messages:
            match message:
                case Claim():
                    self._claim(agent, message)
                case CoordinatorMoved(address=address):
                    self.coordinator.take_address(address)
                case Abandoned():
                    if not self.coordinator.is_led:  # by who starts hosts for the run anew
                        self.end("its coordinator ended, and the run has other hosts by now")

    def _claim(self, agent: AgentLink, claim: Claim) -> None:
        """Give the agent its slot; an agent of an older worker group than the slot's last one is refused."""
        group = claim.group
        name = claim.slot or self._pick_slot(group)
        place = self.places.get(name)
        if place and group < place.group:
            agent.send(Fenced(by=place.group))
            return
        if place is None:
            place = self.places[name] = self._open_place(name, group)
        if place.agent:
            place.agent.send(Fenced(by=group))
        place.group, place.agent, place.env = group, agent, claim.env
        trainer_pid = place.trainer.pid if place.trainer else None
        agent.send(ClaimGranted(slot=name, trainer_pid=trainer_pid, log=str(place.log)))
        slot = Slot(self.spec.node, name)
        place.claim = Claimed(slot=slot, group=group, group_size=claim.group_size, agent_pid=claim.pid)
        place.is_told = False
        if place.trainer is None:
            self.trainers.provide(place)
        else:
            self.trainers.tell_claim(place)

    def _open_place(self, name: str, group: int) -> Place:
        place = self.retired.pop(name, None)
        if place is None:
            return Place(name=name, log=Path(self.spec.folder) / f"{name}.log", env={}, group=group, agent=None)
        place.is_cleared = False
        return place

    def _pick_slot(self, group: int) -> str:
        """Return the first slot that no agent of this group holds (without GPUs, one slot is as good as another)."""
        free = [name for name, place in sorted(self.places.items()) if place.agent is None or place.group < group]
        return free[0] if free else f"cpu{len(self.places)}"

    def _release(self, place: Place) -> None:
        place.agent, place.renewed_s = None, self.loop.awake_s

    def _renew_leases(self, slots: Collection[str]) -> None:
        self.renewed_s = self.loop.awake_s
        for place in self.places.values():
            if place.name in slots:
                place.renewed_s = self.loop.awake_s

    def _expire_leases(self) -> None:
        """End what nobody holds and nobody expects an agent for; with its last slot, the host and its snapshots."""
        oldest_s = self.loop.awake_s - self.spec.lease_s
        expired = [place for place in self.places.values() if place.agent is None and place.renewed_s < oldest_s]
        for place in expired:
            self.coordinator.tell(Expired(slot=Slot(self.spec.node, place.name)))
            self.trainers.clear(place)
            self.retired[place.name] = self.places.pop(place.name)
        if not self.places and (expired or self.renewed_s < oldest_s):
            self.end(f"nobody has renewed its lease for {self.spec.lease_s:g} s")

    # ---- coordinator

    def _get_hello(self) -> HostHello:
        return HostHello(node=self.spec.node, pid=os.getpid(), replica_server=self.trainers.get_replica_address())

    def _enter_service(self) -> None:
        """Have the trainers leave a world that this coordinator does not know, and tell it who is here."""
        for place in self.places.values():
            place.is_told = False
            self.trainers.leave(place)
            self.trainers.tell_claim(place)

    def _tell(self, message: HostMessage) -> bool:
        return self.coordinator.tell(message)

    def _beat(self) -> None:
        """Give a sign of life, and say whose agents hold the slots now."""
        self.coordinator.tell(Beat(holders={place.name: place.get_holder() for place in self.places.values()}))

    def _hear_coordinator(self, message: CoordinatorMessage) -> None:
        match message:
            case Welcome():
                self._enter_service()
            case End(reason=reason, forget=forget):
                if forget:
                    shutil.rmtree(self.spec.disk, ignore_errors=True)
                self.end(reason)
            case Renew(slots=slots):
                self._renew_leases(slots)
            case Join(slot=slot, attempt=attempt):
                if place := self.places.get(slot.name):
                    self.trainers.join(place, attempt)
                else:  # its lease ran out while the message was on its way
                    self.trainers.tell_ended(slot.name, attempt, "crashed", "its slot is gone")
            case ReplicaServersTold():
                self.replica_servers = message
            case Go() | Park() | Leave() | Kill() | RowsKept():
                self._pass_on(message)
            case _:
                assert_never(message)

    def _pass_on(self, message: Go | Park | Leave | Kill | RowsKept) -> None:
        """Have the trainer of a slot do as it is told, unless that comes too late."""
        place = self.places.get(message.slot.name)
        if place is None:
            return
        if isinstance(message, Leave | Kill):
            self.trainers.give_up_joining(place, message.attempt)
        trainer = place.trainer
        if trainer is None or trainer.attempt != message.attempt:
            return
        if isinstance(message, Kill):
            trainer.kill()
            return
        if isinstance(message, Go) and self.replica_servers and self.replica_servers.attempt == message.attempt:
            trainer.link.send(self.replica_servers)
        trainer.link.send(message)


def main() -> None:
    """Become the host of the node that the spec on standard input names, or tell the one that is there the address."""
    fields: dict[str, Any] = json.load(sys.stdin)
    spec = HostSpec(coordinator_address=CoordinatorAddress(**fields.pop("coordinator_address")), **fields)
    folder = Path(spec.folder)
    detach()
    starter = Starter()
    while not take_folder(folder):
        if tell_address(folder, spec.coordinator_address):
            starter.tell_ready()
            return
        time.sleep(_RETRY_S)  # it warms up
    try:
        write_to(folder / "host.log")
        host = _start(spec)
        starter.tell_ready()
        host.serve()
    except BaseException:
        starter.tell_failure()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _start(spec: HostSpec) -> Host:
    """Warm up and open the door to agents."""
    raylet_pidfd = os.pidfd_open(spec.raylet_pid)  # fails if the node is going down already
    if notice := ensure_home(os.environ):  # a pod of any user id has none
        log(notice)
    if not (take_priority_of(spec.raylet_pid, ahead=get_ahead(os.environ)) or take_priority_of(spec.raylet_pid)):
        log(f"trainers run at niceness {os.nice(0)}, as Ray's workers do; RAY_worker_niceness=0 for the raylet helps")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # a thread pool would make forking unsafe; trainers set their own number
    # torch asks whether there is a GPU when it builds a mesh, even of CPUs. By default that opens the driver, and no
    # child of a process that did can use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TORCH_WARM_POOL"] = "0"  # inductor's processes and threads belong to the trainer that compiles
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the allocator that pyarrow brings starts one
    started_s = time.monotonic()
    from cluster.runtime.trainers import trainer  # noqa: PLC0415 (torch: after the fork, with the thread count set)

    trainer.rehearsal.warm_up()
    gc.collect()
    gc.freeze()  # trainers share these pages, and a collection in them never walks torch again
    num_threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    log(f"warm after {time.monotonic() - started_s:.1f} s with {num_threads} thread(s)")
    return Host(spec, raylet_pidfd, trainer.run)


if __name__ == "__main__":
    main()
