"""What can go wrong and when, as a user writes it down: a YAML list of faults. Pure but for reading the file.

- {at_step: 40, fault: kill, target: 1}
- {at_step: 60, fault: drain, target: rank0, notice_s: 15}
- {at_step: 60, fault: kill, phase: starting}
- {at_s: 30, fault: storage_full, for_s: 5}
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from elastic.errors import ConfigError

TrainerFault = Literal["kill", "agent_kill", "freeze"]
NodeFault = Literal["remove", "drain", "term"]
StorageFault = Literal["storage_slow", "storage_full", "storage_flaky"]
Kind = Literal[TrainerFault, NodeFault, StorageFault, "add", "driver_kill"]
Phase = Literal["training", "saving", "starting"]
Scope = Literal["trainer", "node"]

TRAINER_FAULTS: tuple[Kind, ...] = get_args(TrainerFault)
NODE_FAULTS: tuple[Kind, ...] = get_args(NodeFault)
STORAGE_FAULTS: tuple[Kind, ...] = get_args(StorageFault)
KINDS: tuple[Kind, ...] = (*TRAINER_FAULTS, *NODE_FAULTS, "add", "driver_kill", *STORAGE_FAULTS)
PHASES: tuple[Phase, ...] = get_args(Phase)

_ANYWHERE = ("fault", "at_step", "at_s", "phase", "at_world_size", "seed")
_KEYS: dict[Kind, tuple[str, ...]] = {
    "kill": ("target",),
    "agent_kill": ("target",),
    "freeze": ("target", "for_s", "scope"),
    "remove": ("target",),
    "drain": ("target", "notice_s"),
    "term": ("target", "grace_s"),
    "add": (),
    "driver_kill": (),
    "storage_slow": ("for_s", "rate"),
    "storage_full": ("for_s", "rate"),
    "storage_flaky": ("for_s", "rate"),
}
_FLAKY_RATE = 0.1
"""Share of the operations that fail on storage that fails now and then, if the file does not say."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Who is struck: the `index`-th rank, the `index`-th node ever started (from 0), or one drawn by lot."""

    by: Literal["rank", "node", "random"] = "random"
    index: int = 0

    def __str__(self) -> str:
        return self.by if self.by == "random" else f"{self.by}{self.index}"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong (or a node that comes) once training has come so far, and meets the conditions."""

    fault: Kind
    at_step: int | None = None
    """Once any attempt has applied this step."""
    at_s: float | None = None
    """So many seconds after the first step."""
    phase: Phase | None = None
    """Only in this phase: between saves, while a checkpoint is being written, or while a world forms."""
    at_world_size: int | None = None
    """Only while so many train."""
    target: Target = Target()
    notice_s: float = 15.0
    """drain: seconds from the notice until the node is gone."""
    grace_s: float = 5.0
    """term: seconds from SIGTERM until the node is gone."""
    for_s: float = 20.0
    """freeze and storage faults: how long."""
    rate: float = 1.0
    """storage_flaky: share of the operations that fail; storage_slow: MiB/s; storage_full: not read."""
    scope: Scope = "trainer"
    """freeze: the trainer alone, or every process of its node."""
    seed: int = 0
    """Draws a random target, and the operations that flaky storage fails."""

    def __str__(self) -> str:
        when = f"at_step={self.at_step}" if self.at_s is None else f"at_s={self.at_s:g}"
        what = [self.fault, *([str(self.target)] if self.fault in (*TRAINER_FAULTS, *NODE_FAULTS) else [])]
        return " ".join([*what, when, *([f"phase={self.phase}"] if self.phase else [])])


def load_faults(path: Path, *, num_steps: int, num_nodes: int, max_workers: int, seed: int) -> list[Fault]:
    """Read a faults file and check all of it against the run that it is for.

    Args:
        num_steps: of the run.
        num_nodes: that the cluster starts with.
        seed: for faults that name none.

    Raises:
        ConfigError: the file cannot be read, or something in it could never happen.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--faults {path} cannot be read ({error.strerror}). Give the path of a YAML list of faults."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--faults {path} is not YAML: {error}. Write a list of faults, one per line.") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"--faults {path} holds {type(rows).__name__}, not a list of faults. Write lines like "
            "`- {at_step: 40, fault: kill, target: 1}`."
        )
    faults = [
        _parse(row, where=f"--faults {path}: fault {number}", seed=seed)
        for number, row in enumerate(cast(list[Any], rows), start=1)
    ]
    most_nodes = num_nodes + sum(1 for fault in faults if fault.fault == "add")
    for number, fault in enumerate(faults, start=1):
        where = f"--faults {path}: fault {number}"
        _check_reachable(fault, where, num_steps=num_steps, most_nodes=most_nodes, max_workers=max_workers)
    return faults


def _parse(row: object, *, where: str, seed: int) -> Fault:
    """Return one fault; `where` begins each message."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {row!r}, not keys and values. Write {{at_step: 40, fault: kill, target: 1}}.")
    fields = dict(cast(Mapping[str, Any], row))
    kind = fields.get("fault")
    if kind not in KINDS:
        raise ConfigError(f"{where}: fault={kind!r} is not known. {_did_you_mean(kind, KINDS)}")
    allowed = (*_ANYWHERE, *_KEYS[kind])
    for key in fields:
        if key not in allowed:
            raise ConfigError(f"{where}: key {key!r} is not one that fault={kind} has. {_did_you_mean(key, allowed)}")
    if ("at_step" in fields) == ("at_s" in fields):
        both = "both at_step and at_s" if "at_step" in fields else "neither at_step nor at_s"
        raise ConfigError(f"{where} has {both}, so it is not clear when it strikes. Give one of them.")
    _check_values(fields, kind, where)
    if "target" in fields:
        fields["target"] = _parse_target(fields["target"], kind, where)
    values: dict[str, Any] = {"seed": seed, **({"rate": _FLAKY_RATE} if kind == "storage_flaky" else {}), **fields}
    return Fault(**values)


def _check_values(fields: Mapping[str, Any], kind: Kind, where: str) -> None:
    for key, least in (("at_step", 0), ("at_world_size", 1), ("seed", 0)):
        if key in fields and not (type(fields[key]) is int and fields[key] >= least):
            raise ConfigError(f"{where}: {key}={fields[key]!r} must be a whole number, {least} or more.")
    for key in ("at_s", "notice_s", "grace_s", "for_s"):
        if key in fields and not (_is_number(fields[key]) and 0 <= fields[key] < math.inf):
            raise ConfigError(f"{where}: {key}={fields[key]!r} must be a number of seconds, 0 or more.")
    if "rate" in fields:
        _check_rate(fields["rate"], kind, where)
    for key, values in (("phase", PHASES), ("scope", get_args(Scope))):
        if key in fields and fields[key] not in values:
            raise ConfigError(f"{where}: {key}={fields[key]!r} is not known. {_did_you_mean(fields[key], values)}")


def _parse_target(value: object, kind: Kind, where: str) -> Target:
    """Return the target; a bare number is a rank for faults of trainers and a node's index for faults of nodes."""
    if value == "random":
        return Target()
    if type(value) is int and value >= 0:
        return Target(by="rank" if kind in TRAINER_FAULTS else "node", index=value)
    match = re.fullmatch(r"(rank|node) ?(\d+)", value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(
            f"{where}: target={value!r} is nobody. Give random, rank0 (or another rank), node0 (or another node, in "
            f"the order they started), or a number: for {kind} it is "
            f"{'a rank' if kind in TRAINER_FAULTS else 'the index of a node'}."
        )
    return Target(by=cast(Literal["rank", "node"], match[1]), index=int(match[2]))


def _check_reachable(fault: Fault, where: str, *, num_steps: int, most_nodes: int, max_workers: int) -> None:
    if fault.at_step is not None and fault.at_step >= num_steps:
        raise ConfigError(
            f"{where}: at_step={fault.at_step} is never followed by another step of the train.steps={num_steps}, so "
            "nothing could be shown. Lower it, or raise train.steps."
        )
    if fault.target.by == "rank" and fault.target.index >= max_workers:
        raise ConfigError(
            f"{where}: target={fault.target} is no rank of a world of at most cluster.max_workers={max_workers}. "
            f"Name one from rank0 to rank{max_workers - 1}."
        )
    if fault.target.by == "node" and fault.target.index >= most_nodes:
        raise ConfigError(
            f"{where}: target={fault.target} is not among the {most_nodes} nodes that there will ever be. "
            f"Name one from node0 to node{most_nodes - 1}, or raise --nodes."
        )
    if fault.at_world_size is not None and fault.at_world_size > max_workers:
        raise ConfigError(
            f"{where}: at_world_size={fault.at_world_size} is more than cluster.max_workers={max_workers}, so it never "
            "strikes. Lower the first or raise the second."
        )


def _check_rate(rate: object, kind: Kind, where: str) -> None:
    most, meaning = (1.0, "the share of operations that fail") if kind == "storage_flaky" else (math.inf, "MiB/s")
    if not _is_number(rate) or not 0 < cast(float, rate) <= most or rate == math.inf:
        limit = f" and at most {most:g}" if most < math.inf else " and finite"
        raise ConfigError(f"{where}: rate={rate!r} must be above 0{limit}: it is {meaning}. Try rate: {_FLAKY_RATE}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _did_you_mean(value: object, known: tuple[str, ...]) -> str:
    near = get_close_matches(str(value), known, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}."
