"""What runs in the slots of a host: a trainer each, maybe a spare one, and one in the place of any that dies."""

import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.controller import Holder
from cluster.runtime.daemon import log
from cluster.runtime.event_loop import EventLoop
from cluster.runtime.forked import OrderLink, Trainer, fork_trainer
from cluster.runtime.host_spec import HostSpec
from cluster.runtime.messages import (
    Abandoned,
    Alive,
    Claim,
    Exited,
    HostMessage,
    Join,
    KeeperMoved,
    Leave,
    Restored,
    SeatTold,
    SlotClaimed,
    Stalled,
    Stepped,
    TrainerLeft,
    TrainerSaid,
    Warm,
    WorldLeft,
)
from cluster.types import get_leave_limit_s
from elastic.checkpoint.keeping import KeeperProcess, start_keeper
from elastic.transport import Link

AgentLink = Link[Claim | SeatTold | Abandoned]
_Ended = Literal["finished", "interrupted", "lost", "failed", "crashed", "killed"]
_SPARE_AFTER_STEPS = 20
"""A spare trainer rehearses beside one that trains. By then that one has all the GPU memory that it needs."""


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
    claim: SlotClaimed | None = None
    """What the coordinator is told of the newest claim, once the trainer is warm and in no world of another's."""
    is_told: bool = False
    has_forked: bool = False
    """It has had a trainer."""

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

    Raises:
        WireError: the keeper of their snapshots did not start.
    """

    def __init__(
        self, spec: HostSpec, loop: EventLoop, *, tell: Callable[[HostMessage], bool], live: Callable[..., None]
    ) -> None:
        self._spec, self._loop, self._tell, self._live = spec, loop, tell, live
        self._keeper = self._start_keeper() if spec.config["checkpoint"]["memory"] != "off" else None

    # ---- their keeper

    def get_keeper_address(self) -> tuple[str, int] | None:
        """Return where other nodes reach the snapshots of this one; None: none are kept in memory."""
        return (self._spec.node_ip, self._keeper.port) if self._keeper else None

    def _start_keeper(self) -> KeeperProcess:
        spec = self._spec
        return start_keeper(node=spec.node, ip=spec.node_ip, secret=spec.secret, disk=spec.disk)

    def _replace_dead_keeper(self) -> None:
        """Start another keeper if there was one; trainers that hang on the dead one train on without snapshots."""
        if self._keeper is None or self._keeper.process.poll() is None:
            return
        log("the keeper is gone; its snapshots with it")
        self._keeper = self._start_keeper()
        self._tell(KeeperMoved(address=self.get_keeper_address()))

    # ---- worlds

    def join(self, place: Place, attempt: int) -> None:
        """Let the slot's trainer take part in the next world, or one in its place."""
        self._replace_dead_keeper()
        trainer = place.trainer
        # one that the coordinator lost track of (two must never share a slot), or that hangs on a dead keeper
        if trainer is not None and (trainer.attempt is not None or trainer.keeper is not self._keeper):
            self._end(place)
        if place.trainer is None:
            self.provide(place)
        trainer = place.trainer
        assert trainer is not None
        trainer.attempt, trainer.step, trainer.num_steps = attempt, 0, 0
        trainer.link.send(Join(slot=place.name, attempt=attempt))

    def leave(self, place: Place) -> None:
        """Have the slot's trainer leave a world that the coordinator does not know, within a limit."""
        trainer = place.trainer
        if trainer and trainer.attempt is not None:
            uses_gpus = bool(self._spec.config["cluster"]["gpus_per_worker"])
            trainer.leave_until_s = self._loop.awake_s + get_leave_limit_s(uses_gpus=uses_gpus)
            trainer.link.send(Leave(slot=place.name, attempt=trainer.attempt))

    def check(self, place: Place) -> None:
        """Look after a trainer that has not left its world in time, or gives no sign of life; call it now and then."""
        trainer = place.trainer
        if trainer is None:
            return
        now_s = self._loop.awake_s
        if trainer.leave_until_s is not None and now_s > trainer.leave_until_s and not trainer.killed:
            trainer.kill()  # another takes its place
        silent_s: float = self._spec.config["fault"]["silent_s"]
        if trainer.heard_s is not None and not trainer.said and now_s - trainer.heard_s > silent_s:
            trainer.heard_s = now_s  # the next complaint waits as long
            log(f"the trainer of {place.name} is frozen: no sign of life for {silent_s:g} s")
            stall = Stalled(step=trainer.step, where="silent", waited_s=silent_s)
            self._tell(TrainerSaid(slot=place.name, attempt=trainer.attempt, message=stall))

    def tell_claim(self, place: Place) -> None:
        """Tell a claim that is news, unless its trainer could not join a world yet."""
        trainer = place.trainer
        is_busy = trainer is not None and (not trainer.is_warm or trainer.leave_until_s is not None)
        if place.claim and not place.is_told and not is_busy:
            place.is_told = self._tell(place.claim)

    def tell_ended(self, slot: str, attempt: int, outcome: _Ended, reason: str, exit_code: int = 1) -> None:
        """Tell how a trainer's part in a world ended."""
        self._tell(TrainerLeft(slot=slot, attempt=attempt, outcome=outcome, reason=reason, exit_code=exit_code))

    # ---- processes

    def provide(self, place: Place) -> None:
        """Give a slot that has none a trainer: its spare, if that is ready, else one that is forked now."""
        self._replace_dead_keeper()
        spare = place.spare
        if spare and spare.is_warm and spare.keeper is self._keeper:
            place.trainer, place.spare = spare, None
            return
        self._end_spare(place)
        # one that replaces another is waited for
        place.trainer = self._fork(place, rehearses="not" if place.has_forked else "fully")
        place.has_forked = True

    def clear(self, place: Place) -> None:
        """End all that runs in a slot; nothing takes its place."""
        self._end(place)
        self._end_spare(place)

    def _fork(self, place: Place, *, rehearses: Literal["fully", "sparingly", "not"]) -> Trainer:
        spec = self._spec

        def run(link: OrderLink, keeper: socket.socket | None) -> None:
            self._live(
                link,
                spec.config,
                node=spec.node,
                node_ip=spec.node_ip,
                keeper=keeper,
                secret=spec.secret,
                folder=Path(spec.folder),
                rehearses=rehearses,
            )

        inherited = self._loop.get_descriptors()
        trainer = fork_trainer(run, keeper=self._keeper, env=place.env, log=place.log, inherited=inherited)
        self._loop.watch(trainer.link, lambda: self._hear(place, trainer))
        self._loop.watch(trainer.pidfd, lambda: (self._reap_spare if trainer is place.spare else self._reap)(place))
        return trainer

    def _hear(self, place: Place, trainer: Trainer) -> None:
        messages = trainer.link.receive()
        if messages is None:
            if trainer.link.fault:
                log(f"the connection to the trainer of {place.name} was ended: {trainer.link.fault}")
                os.kill(trainer.pid, signal.SIGKILL)  # nobody can lead it any more; another takes its place
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
                    if isinstance(message, (Restored, Stepped)):
                        trainer.step = message.progress.step
                    if isinstance(message, Stepped):
                        trainer.num_steps += 1
                        if trainer.num_steps == _SPARE_AFTER_STEPS:
                            self._provide_spare(place)
                    self._tell(TrainerSaid(slot=place.name, attempt=trainer.attempt, message=message))

    def _book_leave(self, place: Place, trainer: Trainer, left: WorldLeft) -> None:
        """Tell that a trainer, which stays, is in its world no more."""
        attempt, trainer.attempt, trainer.heard_s = trainer.attempt, None, None
        trainer.leave_until_s = None
        if attempt is not None:
            self.tell_ended(place.name, attempt, left.outcome, left.reason, left.exit_code)
        self.tell_claim(place)

    def _reap(self, place: Place, *, then: Literal["replace", "nothing"] = "replace") -> None:
        """Book a trainer's end, after all that it has still said; one that had a world is replaced at once."""
        trainer = place.trainer
        assert trainer is not None
        while trainer.is_talking and trainer.link.can_receive():
            self._hear(place, trainer)
        if trainer.is_talking:  # a child of its own has the other end, and will say nothing
            trainer.is_talking = False
            self._loop.unwatch(trainer.link)
        _, status = os.waitpid(trainer.pid, 0)
        self._loop.unwatch(trainer.pidfd)
        place.trainer = None
        code = os.waitstatus_to_exitcode(status)
        attempt, said = trainer.attempt, trainer.said
        if place.agent:
            place.agent.send(Exited(pid=trainer.pid, code=code, attempt=attempt))
        if attempt is None:
            log(f"the trainer of {place.name} ended with {code} while it waited for a world")
            self.tell_claim(place)  # the next one is forked when it is needed, and what ends that one is told
            return
        if said:
            self.tell_ended(place.name, attempt, said.outcome, said.reason, said.exit_code)
        elif trainer.killed:
            self.tell_ended(place.name, attempt, "killed", "ended by its coordinator")
        else:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self.tell_ended(place.name, attempt, "crashed", f"trainer ended with {how}")
        if then == "replace":
            if not said:
                self.provide(place)
            self.tell_claim(place)

    def _end(self, place: Place) -> None:
        if place.trainer:
            place.trainer.kill()
            self._reap(place, then="nothing")

    # ---- spares

    def _provide_spare(self, place: Place) -> None:
        """Have a process ready, with device and compiled code, for when the trainer dies.

        One that is forked only then would be slow where code is compiled.
        """
        config = self._spec.config
        is_wanted = config["compile"] and config["cluster"]["spare_trainers"]
        if is_wanted and place.has_spares and place.spare is None:
            self._replace_dead_keeper()
            place.spare = self._fork(place, rehearses="sparingly")

    def _reap_spare(self, place: Place) -> None:
        """Do without spares in a slot whose spare ends by itself: its GPU may allow one process only."""
        self._end_spare(place)
        place.has_spares = False
        log(f"the spare trainer of {place.name} ended; it gets no other")

    def _end_spare(self, place: Place) -> None:
        spare, place.spare = place.spare, None
        if spare is None:
            return
        spare.kill()
        os.waitpid(spare.pid, 0)
        self._loop.unwatch(spare.pidfd)
        if spare.is_talking:
            self._loop.unwatch(spare.link)
