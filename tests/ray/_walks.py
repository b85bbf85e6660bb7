"""Faults by lot, and every fault in every phase: rows of a faults file.

Each waits, by `at_world_size`, until those before it have had their effect; so the sizes of the world are known
beforehand, whatever the machine's speed. One in the phase `starting` follows something that makes a world form. Nodes
are named by their index; who freezes is never the one that failed last, for a node that hangs is soon left out.
"""

import random
from collections.abc import Iterator, Mapping

Row = dict[str, object]

LIMITS: Mapping[str, object] = {
    "fault.hang_step_s": 4,
    "fault.silent_s": 5,
    "fault.hang_data_s": 5,
    "checkpoint.max_failed_saves": 100,
    "fault.max_node_failures": 100,
    "fault.max_failures_without_progress": 100,
}
"""What is frozen is found within seconds; nobody is left out, and nothing given up, for being unlucky."""
SHORT: Mapping[str, Row] = {
    "drain": {"notice_s": 4},
    "term": {"grace_s": 4},
    "freeze": {"for_s": 8},  # longer than it takes to be replaced: it comes back late
    "storage_slow": {"for_s": 5, "rate": 1},
    "storage_full": {"for_s": 5},  # long enough for a save to fail
    "storage_flaky": {"for_s": 5, "rate": 0.2},
}
KINDS = (
    *("kill", "agent_kill", "freeze", "remove", "add", "drain", "driver_kill", "add"),
    *("term", "storage_slow", "add", "storage_full", "storage_flaky"),
)
"""Each kind of fault, in an order in which the world neither dies out nor grows beyond its first size."""
STEPS_APART, STEPS_OF_A_JOIN = 40, 150
"""Each fault of a phase has shown its effect, some saves included, before the next strikes."""
LOSSES = ("remove", "drain", "term")
BLOWS = ("kill", "agent_kill", "freeze", "driver_kill", "storage_slow", "storage_full", "storage_flaky")
"""They leave the world as large as it was."""


class _Fleet:
    """The nodes that will be there."""

    def __init__(self, num_nodes: int) -> None:
        self.alive = list(range(num_nodes))
        self.num_started = num_nodes
        self.sizes = [num_nodes]

    @property
    def size(self) -> int:
        return self.sizes[-1]

    def grow(self) -> None:
        self.alive.append(self.num_started)
        self.num_started += 1
        self.sizes.append(len(self.alive))

    def lose(self, *nodes: int) -> None:
        self.alive = [node for node in self.alive if node not in nodes]
        self.sizes.append(len(self.alive))


def plan_phase(phase: str, *, num_nodes: int = 3) -> tuple[list[Row], list[int]]:
    """Return every kind of fault in one phase, and the sizes of the world that begins with so many workers."""
    fleet, rows, at_step = _Fleet(num_nodes), list[Row](), 0
    for number, kind in enumerate((*KINDS, "freeze")):
        at_step += STEPS_APART
        first = f"node{fleet.alive[0]}"
        fault: Row = {"at_step": at_step, "fault": kind, **SHORT.get(kind, {}), "phase": phase}
        if kind in (*LOSSES, "agent_kill", "freeze"):
            fault["target"] = f"node{fleet.alive[-1]}"
        elif kind == "kill":
            fault["target"] = first
        if number == len(KINDS):
            fault["scope"] = "node"
        if phase == "starting":
            rows += [{"at_step": at_step, "fault": "kill", "target": first, "at_world_size": fleet.size}, fault]
        else:
            rows.append({**fault, "at_world_size": fleet.size})
        if kind == "add":
            fleet.grow()
            at_step += STEPS_OF_A_JOIN
        if kind in LOSSES:
            fleet.lose(fleet.alive[-1])
    return rows, fleet.sizes


def plan_walk(seed: int, *, num_changes: int, num_nodes: int = 3, most: int = 4) -> tuple[list[Row], list[int]]:
    """Return faults that change the size of the world so often, at random, and the sizes from 1 to `most` it takes.

    Every third loss or so takes two nodes at once, as providers do. Behind each change another fault strikes: all kinds
    in turn, in the phases by lot.
    """
    lot = random.Random(seed)
    fleet, blows, rows, step, failed = _Fleet(num_nodes), _shuffle_for_ever(BLOWS, lot), list[Row](), 10, -1
    for number in range(num_changes):
        where: Row = {"at_step": step, "at_world_size": fleet.size}
        if fleet.size == 1 or (fleet.size < most and lot.random() < 1 / 2):
            rows.append({**where, "fault": "add"})
            fleet.grow()
        else:
            kind = lot.choice(LOSSES)
            gone = lot.sample(fleet.alive, 2 if fleet.size > 2 and lot.random() < 1 / 3 else 1)
            rows += [{**where, "fault": kind, **SHORT.get(kind, {}), "target": f"node{node}"} for node in gone]
            fleet.lose(*gone)
        kind, phase = next(blows), lot.choice(["starting", "training", "saving"])
        if kind == "driver_kill" and number == num_changes - 1:
            kind = next(blows)  # the run would end while its driver starts, which cannot take that in good order yet
        blow: Row = {"at_step": step, "fault": kind, **SHORT.get(kind, {}), "phase": phase}
        if kind.startswith("storage"):
            blow["seed"] = step
        if kind in ("kill", "agent_kill", "freeze"):
            victim = lot.choice([node for node in fleet.alive if node != failed] or fleet.alive)
            failed = failed if kind == "agent_kill" else victim
            blow["target"] = f"node{victim}"
        rows.append(blow if phase == "starting" else {**blow, "at_world_size": fleet.size})
        step += lot.randint(3, 9)
    return rows, fleet.sizes


def _shuffle_for_ever(kinds: tuple[str, ...], lot: random.Random) -> Iterator[str]:
    while True:
        yield from lot.sample(kinds, len(kinds))
