"""What runs in the slots of a host: a trainer each, maybe a spare one, and one in the place of any that dies."""

import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cluster.controller import Holder
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.messages import (
    Abandoned,
    Alive,
    Claim,
    CoordinatorMoved,
    Exited,
    HostMessage,
    Progressed,
    ReplicaServerMoved,
    Restored,
    Stalled,
    Stepped,
    TrainerMessage,
    TrainerSaid,
    Warm,
    WorldLeft,
)
from cluster.runtime.node.daemon import log
from cluster.runtime.node.host_spec import HostSpec, get_replica_folder
from cluster.runtime.node.replica_server import NodeReplicaServer
from cluster.runtime.trainers.forked import OrderLink, Trainer, fork_trainer
from cluster.types import (
    Claimed,
    Join,
    Leave,
    Slot,
    TrainerDying,
    TrainerEnded,
    TrainerOutcome,
    Unkillable,
    get_leave_limit_s,
)
from elastic.checkpoint.replicas.process import ReplicaServerProcess, launch_replica_server
from elastic.processes import describe_state, is_exiting
from elastic.transport import Link

AgentLink = Link[Claim | CoordinatorMoved | Abandoned]
_SPARE_AFTER_STEPS = 20
"""A spare trainer rehearses beside one that trains. By then that one has all the GPU memory that it needs."""
UNKILLABLE_S = 5.0
"""Less than the coordinator waits (`Policy.kill_s`): it then knows more than that nothing has come of its `Kill`."""
_LOOK_S = 0.01


@dataclass(kw_only=True)
class Place:
    """One slot: who claims it and what runs in it."""

    name: str
    log: Path
    """Of its trainers."""
    env: Mapping[str, str]
    group: int
    agent: AgentLink | None
    renewed_s: float = 0.0
    """Without an agent, the last renewal of its lease (`EventLoop.awake_s`)."""
    trainer: Trainer | None = None
    spare: Trainer | None = None
    """Takes the trainer's place when that dies."""
    has_spares: bool = True
    """Until one has ended by itself."""
    claim: Claimed | None = None
    """What the coordinator is told of the newest claim, once the trainer is warm and in no world of another's."""
    is_told: bool = False
    has_forked: bool = False
    """It has had a trainer."""
    joining: int | None = None
    """The attempt that it joins once the process in it has ended."""
    is_cleared: bool = False
    """Its lease has run out; nothing takes the place of what runs in it."""

    def get_holder(self) -> Holder | None:
        """Return the worker group of the agent that holds it, and the group's size; None without an agent."""
        if self.agent is None:
            return None
        assert self.claim is not None  # an agent comes with one
        return Holder(group=self.group, group_size=self.claim.group_size)


class Trainers:
    """Forks the trainers of a host's places, hears and ends them, and tells the coordinator of it all.

    Args:
        tell: sends the coordinator a message; False if it has not been told.
        live: a trainer's life, `trainer.run`; this process has imported what that needs.
    """

    def __init__(
        self, spec: HostSpec, loop: EventLoop, *, tell: Callable[[HostMessage], bool], live: Callable[..., None]
    ) -> None:
        self._spec, self._loop, self._tell, self._live = spec, loop, tell, live
        self._dying: list[Trainer] = []
        """Spares that nobody waits for, and that have not ended."""
        self._replica_server: NodeReplicaServer | None = None
        if spec.config["checkpoint"]["memory"] != "off":
            folder = str(get_replica_folder(Path(spec.folder)))
            launch = partial(
                launch_replica_server,
                node=spec.node,
                ip=spec.node_ip,
                secret=spec.secret,
                disk=spec.disk,
                folder=folder,
            )
            self._replica_server = NodeReplicaServer(
                lambda port: launch(port=port), on_changed=self._tell_replica_server
            )
            self._replica_server.start()

    # ---- their replica server

    def get_replica_address(self) -> tuple[str, int] | None:
        """Return where other nodes reach the snapshots of this one; None: none are kept in memory now."""
        port = self._replica_server.get_port() if self._replica_server else None
        return None if port is None else (self._spec.node_ip, port)

    def check_replica_server(self) -> None:
        """Look after the replica server; call it often."""
        if self._replica_server:
            self._replica_server.check()

    def _get_replica_server(self) -> ReplicaServerProcess | None:
        return self._replica_server.current if self._replica_server else None

    def _tell_replica_server(self) -> None:
        self._tell(ReplicaServerMoved(address=self.get_replica_address()))

    # ---- worlds

    def join(self, place: Place, attempt: int) -> None:
        """Let the slot's trainer take part in the next world, or one in its place."""
        trainer = place.trainer
        # one that the coordinator lost track of: two must never share a slot
        if trainer is not None and (trainer.killed_s is not None or trainer.attempt is not None):
            trainer.kill()
            place.joining = attempt  # once it has ended
            return
        if place.trainer is None:
            self.provide(place)
        trainer = place.trainer
        if trainer is None:
            self.tell_ended(place.name, attempt, "crashed", "no trainer could be forked; the host's log says why")
            return
        trainer.attempt, trainer.step, trainer.num_steps = attempt, 0, 0
        trainer.link.send(Join(slot=self._get_slot(place.name), attempt=attempt))

    def leave(self, place: Place) -> None:
        """Have the slot's trainer leave a world that the coordinator does not know, within a limit."""
        trainer = place.trainer
        if trainer and trainer.attempt is not None:
            uses_gpus = bool(self._spec.config["cluster"]["gpus_per_worker"])
            trainer.leave_until_s = self._loop.awake_s + get_leave_limit_s(uses_gpus=uses_gpus)
            trainer.link.send(Leave(slot=self._get_slot(place.name), attempt=trainer.attempt))

    def check(self, place: Place) -> None:
        """Look after a trainer that has not left its world in time, or gives no sign of life; call it now and then."""
        trainer = place.trainer
        if trainer is None:
            return
        if trainer.killed_s is not None and time.monotonic() > trainer.killed_s + UNKILLABLE_S:
            self._check_dying(place, trainer)
        is_wanted = not trainer.killed and not trainer.said and not trainer.is_dying
        if trainer.attempt is not None and is_wanted and is_exiting(trainer.pid):
            trainer.is_dying = True
            self._tell(TrainerDying(slot=self._get_slot(place.name), attempt=trainer.attempt))
        now_s = self._loop.awake_s
        if trainer.leave_until_s is not None and now_s > trainer.leave_until_s and not trainer.killed:
            trainer.kill()  # another takes its place
        silent_s: float = self._spec.config["fault"]["silent_s"]
        if trainer.heard_s is not None and not trainer.said and now_s - trainer.heard_s > silent_s:
            trainer.heard_s = now_s  # the next complaint waits as long
            log(f"the trainer of {place.name} is frozen: no sign of life for {silent_s:g} s")
            stall = Stalled(step=trainer.step, where="silent", waited_s=silent_s)
            self._tell(TrainerSaid(slot=self._get_slot(place.name), attempt=trainer.attempt, message=stall))

    def _check_dying(self, place: Place, trainer: Trainer) -> None:
        """Tell that a process which was killed is still there, for each attempt that it is in the way of."""
        attempt, place.joining = (trainer.attempt if place.joining is None else place.joining), None
        if attempt is None or attempt in trainer.stuck_in:
            return
        trainer.stuck_in.append(attempt)
        reason = f"process {trainer.pid} ({describe_state(trainer.pid)}) has not ended {UNKILLABLE_S:g} s after SIGKILL"
        log(f"{place.name}: {reason}")
        self._tell(Unkillable(slot=self._get_slot(place.name), attempt=attempt, reason=reason))

    def tell_claim(self, place: Place) -> None:
        """Tell a claim that is news, unless its trainer could not join a world yet."""
        trainer = place.trainer
        is_busy = trainer is not None and (
            not trainer.is_warm or trainer.leave_until_s is not None or trainer.killed_s is not None
        )
        if place.claim and not place.is_told and not is_busy:
            place.is_told = self._tell(place.claim)

    def tell_ended(self, slot: str, attempt: int, outcome: TrainerOutcome, reason: str, exit_code: int = 1) -> None:
        """Tell how a trainer's part in a world ended."""
        place = self._get_slot(slot)
        self._tell(TrainerEnded(slot=place, attempt=attempt, outcome=outcome, reason=reason, exit_code=exit_code))

    def _get_slot(self, name: str) -> Slot:
        return Slot(self._spec.node, name)

    # ---- processes

    def provide(self, place: Place) -> None:
        """Give a slot that has none a trainer: its spare, if that is ready, else one that is forked now."""
        spare = place.spare
        if spare and spare.is_warm:
            place.trainer, place.spare = spare, None
            return
        self._end_spare(place)
        # one that replaces another is waited for
        place.trainer = self._fork(place, rehearses="not" if place.has_forked else "fully")
        place.has_forked = place.has_forked or place.trainer is not None

    def clear(self, place: Place) -> None:
        """End all that runs in a slot; nothing takes its place until somebody claims it again."""
        place.is_cleared = True
        if place.trainer:
            place.trainer.kill()
        self._end_spare(place)

    def give_up_joining(self, place: Place, attempt: int) -> None:
        """Let a world go for which the slot's next trainer waited; nothing happens unless it did."""
        if place.joining == attempt:
            place.joining = None
            self.tell_ended(place.name, attempt, "lost", "the world was given up before it was joined")

    def end_all(self, places: Iterable[Place], *, limit_s: float) -> None:
        """End all trainers; return once they have ended, or at the limit: the kernel may never let go of one."""
        trainers = [each for place in places for each in (place.trainer, place.spare) if each] + self._dying
        for trainer in trainers:
            trainer.kill()
        until_s = time.monotonic() + limit_s
        while trainers and time.monotonic() < until_s:
            trainers = [trainer for trainer in trainers if trainer.take_exit_code() is None]
            time.sleep(_LOOK_S)
        for trainer in trainers:
            log(f"process {trainer.pid} is left behind: {describe_state(trainer.pid)}")

    def _fork(self, place: Place, *, rehearses: Literal["fully", "sparingly", "not"]) -> Trainer | None:
        """Fork a trainer; None if the kernel has no process, memory or descriptor for one now."""
        spec = self._spec

        def run(link: OrderLink, replica_server: socket.socket | None) -> None:
            self._live(
                link,
                spec.config,
                node=spec.node,
                node_ip=spec.node_ip,
                replica_server=replica_server,
                secret=spec.secret,
                folder=Path(spec.folder),
                rehearses=rehearses,
            )

        inherited = self._loop.get_descriptors()
        try:
            trainer = fork_trainer(
                run, replica_server=self._get_replica_server(), env=place.env, log=place.log, inherited=inherited
            )
        except OSError as error:  # the others of this host train on
            log(f"no trainer can be forked for {place.name}: {error}")
            return None
        self._loop.watch(trainer.link, lambda: self._hear(place, trainer))
        self._loop.watch(trainer.pidfd, lambda: self._hear_end(place, trainer))
        return trainer

    def _hear(self, place: Place, trainer: Trainer) -> None:
        messages = trainer.link.receive()
        if messages is None:
            if trainer.link.fault:
                log(f"the connection to the trainer of {place.name} was ended: {trainer.link.fault}")
                trainer.kill(is_wanted=False)  # nobody can lead it any more; another takes its place
            trainer.is_talking = False
            self._loop.unwatch(trainer.link)
            return
        for message in messages:
            match message:
                case Warm():
                    trainer.is_warm = True
                    if trainer is place.spare:
                        log(f"the spare trainer of {place.name} is ready")
                    self.tell_claim(place)
                case Alive():
                    trainer.heard_s = self._loop.awake_s
                case WorldLeft(stays=True):
                    self._book_leave(place, trainer, message)
                case WorldLeft():
                    trainer.said = message
                case _:
                    self._take_steps(place, trainer, message)
                    if isinstance(message, Progressed) and not message.times:
                        continue
                    self._tell(TrainerSaid(slot=self._get_slot(place.name), attempt=trainer.attempt, message=message))

    def _take_steps(self, place: Place, trainer: Trainer, message: TrainerMessage) -> None:
        """Note how far a trainer is."""
        num_before = trainer.num_steps
        match message:
            case Restored(progress=progress):
                trainer.step = progress.step
            case Stepped(progress=progress):
                trainer.step = progress.step
                trainer.num_steps += 1
            case Progressed():
                trainer.step, trainer.num_steps = message.step, message.num_steps
            case _:
                return
        if num_before < _SPARE_AFTER_STEPS <= trainer.num_steps:
            self._provide_spare(place)

    def _book_leave(self, place: Place, trainer: Trainer, left: WorldLeft) -> None:
        """Tell that a trainer, which stays, is in its world no more."""
        attempt, trainer.attempt, trainer.heard_s = trainer.attempt, None, None
        trainer.leave_until_s = None
        if attempt is not None:
            self.tell_ended(place.name, attempt, left.outcome, left.reason, left.exit_code)
        self.tell_claim(place)

    def _hear_end(self, place: Place, trainer: Trainer) -> None:
        """Take note that a trainer has ended, after all that it has still said."""
        while trainer.is_talking and trainer.link.can_receive():
            self._hear(place, trainer)
        if trainer.is_talking:  # a child of its own has the other end, and will say nothing
            trainer.is_talking = False
            self._loop.unwatch(trainer.link)
        code = trainer.take_exit_code()
        if code is None:
            return
        self._loop.unwatch(trainer.pidfd)
        if trainer in self._dying:
            self._dying.remove(trainer)
        elif trainer is place.spare:  # its GPU may allow one process only
            place.spare, place.has_spares = None, False
            log(f"the spare trainer of {place.name} ended; it gets no other")
        else:
            place.trainer = None
            self._book_end(place, trainer, code)

    def _book_end(self, place: Place, trainer: Trainer, code: int) -> None:
        """Tell how a trainer ended; one that had a world is replaced at once, unless by one that nobody waits for."""
        attempt, said = trainer.attempt, trainer.said
        if place.agent:
            place.agent.send(Exited(pid=trainer.pid, code=code, attempt=attempt))
        if attempt is None:
            log(f"the trainer of {place.name} ended with {code} while it waited for a world")
        elif said:
            self.tell_ended(place.name, attempt, said.outcome, said.reason, said.exit_code)
        elif trainer.killed:
            self.tell_ended(place.name, attempt, "killed", "ended by its coordinator")
        else:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self.tell_ended(place.name, attempt, "crashed", f"trainer ended with {how}")
        for of_other in trainer.stuck_in:  # a world that did without this slot
            if of_other != attempt:
                self.tell_ended(place.name, of_other, "killed", "the process in its slot has ended at last")
        if place.is_cleared:
            return
        if (joining := place.joining) is not None:
            place.joining = None
            self.join(place, joining)
            return
        if attempt is not None and not said:
            self.provide(place)
        self.tell_claim(place)  # without a trainer: the next is forked when it is needed, and what ends that is told

    # ---- spares

    def _provide_spare(self, place: Place) -> None:
        """Have a process ready, with device and compiled code, for when the trainer dies.

        One that is forked only then would be slow where code is compiled.
        """
        config = self._spec.config
        is_wanted = config["compile"] and config["cluster"]["spare_trainers"]
        if is_wanted and place.has_spares and place.spare is None:
            place.spare = self._fork(place, rehearses="sparingly")

    def _end_spare(self, place: Place) -> None:
        spare, place.spare = place.spare, None
        if spare is not None:
            spare.kill()
            self._dying.append(spare)
