"""Which faults strike now, and whom: a pure function of what is planned and what is seen.

Faults with `at_step` strike in the order of their steps, those with `at_s` in the order of their times; one that waits
for a save or for the size of the world holds up those behind it, so that a file reads as a story. One that waits for a
world to form lets those of its own moment pass, for one of them may make it form; if none of them does, or if that
world has formed before anyone looked, those of later moments pass as well. What a target means is decided when it is
struck. One who is gone by then (a rank beyond the world, a node that was removed) is replaced: the number counts around
among those who are left, so that a fault that was asked for always happens.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.chaos.faults import NODE_FAULTS, TRAINER_FAULTS, Fault, Phase, Target
from cluster.types import Scene, Worker

_CHANGE_THE_WORLD = (*NODE_FAULTS, "add", "kill", "freeze")
_AT_WORK = ("forming", "running", "parking")
_Moment = tuple[int | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A fault that is due, with the one it hits."""

    fault: Fault
    number: int
    """Of the fault, in the order they were given."""
    worker: Worker | None = None
    """The trainer that is hit."""
    node: str | None = None
    """The node that is hit, or that the trainer is on."""

    def comes_after(self, earlier: "Strike") -> bool:
        """Tell whether this one waits for one before it in the order of what struck."""
        return (self.fault.at_step is None) == (earlier.fault.at_step is None)


class Schedule:
    """The faults that are still to come.

    Args:
        faults: in any order; those of one step, or one time, strike in the order given.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        numbered = sorted(
            enumerate(faults), key=lambda pair: (pair[1].at_s if pair[1].at_step is None else pair[1].at_step) or 0
        )
        self._by_step = [pair for pair in numbered if pair[1].at_step is not None]
        self._by_time = [pair for pair in numbered if pair[1].at_step is None]
        self._forming = {
            _get_moment(fault)
            for _, fault in numbered
            if fault.fault in _CHANGE_THE_WORLD and fault.phase != "starting"
        }
        """Moments after which a world forms."""
        self._changed: dict[_Moment, int] = {}
        """The attempt that was at work when a moment's faults brought a new world about."""

    @property
    def waiting(self) -> list[Fault]:
        """The faults that have not struck."""
        return [fault for _, fault in (*self._by_step, *self._by_time)]

    def waits_for_moment(self, *, step: int, elapsed_s: float) -> bool:
        """Tell whether a fault that is due waits for a save or for a world to form."""
        return any(
            fault.phase in ("saving", "starting") and _is_time(fault, step=step, elapsed_s=elapsed_s)
            for fault in self.waiting
        )

    def take_due(
        self,
        scene: Scene,
        *,
        nodes: Sequence[str | None],
        elapsed_s: float,
        is_saving: bool,
        lacks_nodes: bool = False,
    ) -> list[Strike]:
        """Return the faults that strike now; they are not waiting any more.

        Args:
            nodes: every node ever started, by index; None in the place of one that is gone or about to go.
            elapsed_s: since the first step; negative before it.
            is_saving: a checkpoint is being written.
            lacks_nodes: too few nodes live for training, so no further step comes before a node does.
        """
        if lacks_nodes and (rescue := self._take_rescue(elapsed_s)):
            return [rescue]
        phase = get_phase(scene, is_saving=is_saving)
        strikes: list[Strike] = []
        for queue in (self._by_step, self._by_time):
            held_up_by: Fault | None = None
            for numbered in list(queue):
                _, fault = numbered
                if not _is_time(fault, step=scene.step, elapsed_s=elapsed_s):
                    break
                if held_up_by and _get_moment(fault) != _get_moment(held_up_by):
                    break
                strike = _aim(numbered, scene, nodes, before=strikes) if _meets(fault, scene, phase) else None
                if strike is not None:
                    strikes.append(strike)
                    queue.remove(numbered)
                    if fault.fault in _CHANGE_THE_WORLD and fault.phase != "starting":
                        self._changed[_get_moment(fault)] = scene.attempt
                elif fault.phase != "starting":
                    break
                elif self._is_to_form(_get_moment(fault), scene):
                    held_up_by = fault
        return strikes

    def _take_rescue(self, elapsed_s: float) -> Strike | None:
        """Return the next node to come, before its step and past what waits for a world; None if time brings one.

        Without it the run would wait forever: the step of its moment is never reached.
        """
        for numbered in (pair for pair in self._by_time if pair[1].fault == "add"):
            if not _is_time(numbered[1], step=0, elapsed_s=elapsed_s):
                return None
            self._by_time.remove(numbered)
            return Strike(fault=numbered[1], number=numbered[0])
        for numbered in (pair for pair in self._by_step if pair[1].fault == "add"):
            self._by_step.remove(numbered)
            return Strike(fault=numbered[1], number=numbered[0])
        return None

    def _is_to_form(self, moment: _Moment, scene: Scene) -> bool:
        """Tell whether the faults of a moment still bring a world."""
        if moment not in self._forming:
            return False
        was_at_work = self._changed.get(moment)
        return was_at_work is None or scene.attempt == was_at_work or not _has_formed(scene)

    def put_back(self, strike: Strike) -> None:
        """Let a fault wait again, before all others of its kind: who it was to hit had just gone."""
        queue = self._by_time if strike.fault.at_step is None else self._by_step
        queue.insert(0, (strike.number, strike.fault))


def get_phase(scene: Scene, *, is_saving: bool) -> Phase | None:
    """Return what a strike would interrupt; None between worlds."""
    if scene.stage == "forming" or (scene.stage == "running" and not scene.attempt_step):
        return "starting"
    if scene.stage in ("running", "parking"):
        return "saving" if is_saving else "training"
    return None


def _get_moment(fault: Fault) -> _Moment:
    return fault.at_step, fault.at_s


def _is_time(fault: Fault, *, step: int, elapsed_s: float) -> bool:
    return step >= fault.at_step if fault.at_step is not None else elapsed_s >= (fault.at_s or 0.0)


def _meets(fault: Fault, scene: Scene, phase: Phase | None) -> bool:
    if fault.phase is not None and fault.phase != phase:
        return False
    if fault.at_world_size is None:
        return True
    return _has_formed(scene) and scene.world_size == fault.at_world_size


def _has_formed(scene: Scene) -> bool:
    return scene.stage == "running" and scene.attempt_step > 0


def _aim(
    numbered: tuple[int, Fault], scene: Scene, nodes: Sequence[str | None], *, before: Sequence[Strike]
) -> Strike | None:
    """Choose who is hit; None if there is nobody (yet). Strikes drawn by lot at one moment hit different ones."""
    number, fault = numbered
    lot = random.Random(f"{fault.seed} {number}")
    if fault.fault in TRAINER_FAULTS:
        taken = {strike.worker.rank for strike in before if strike.worker}
        worker = _choose_worker(fault.target, scene, nodes, taken, lot)
        return Strike(fault=fault, number=number, worker=worker, node=worker.node) if worker else None
    if fault.fault in NODE_FAULTS:
        taken_nodes = {strike.node for strike in before if strike.node}
        node = _choose_node(fault.target, scene, nodes, taken_nodes, lot)
        return Strike(fault=fault, number=number, node=node) if node else None
    return Strike(fault=fault, number=number)


def _choose_worker(
    target: Target, scene: Scene, nodes: Sequence[str | None], taken: set[int], lot: random.Random
) -> Worker | None:
    """Return a trainer of the current world; None if there is no world, or the trainer has not said who it is."""
    if scene.stage not in _AT_WORK or not scene.world_size:
        return None
    by_rank = {worker.rank: worker for worker in scene.workers if worker.node in nodes}
    match target.by:
        case "rank":
            return by_rank.get(target.index % scene.world_size)
        case "node":
            node = _choose_node(target, scene, nodes, set(), lot)
            return next((worker for worker in by_rank.values() if worker.node == node), None)
        case "random":
            ranks = [rank for rank in range(scene.world_size) if rank not in taken]
            return by_rank.get(lot.choice(ranks)) if ranks else None


def _choose_node(
    target: Target, scene: Scene, nodes: Sequence[str | None], taken: set[str], lot: random.Random
) -> str | None:
    alive = [node for node in nodes if node is not None]
    if not alive:
        return None
    match target.by:
        case "rank":
            worker = _choose_worker(target, scene, nodes, set(), lot)
            return worker.node if worker else None
        case "node":
            named = nodes[target.index] if target.index < len(nodes) else None
            return named or alive[target.index % len(alive)]
        case "random":
            spared = [node for node in alive if node not in taken]
            return lot.choice(spared) if spared else None
