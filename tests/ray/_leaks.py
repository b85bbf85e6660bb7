"""What the processes of a run hold on to while its worlds come and go.

A process that lives through many worlds must not hold more after the last than after the first. What it holds depends
on the size of the world (a connection to each peer, say), so only worlds of one size are compared.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.processes import find_running
from tests.ray._traces import find_processes, get_parent

EVERY_S = 1.0
MOST_GROWTH = 2
"""Descriptors: one that leaks per world is more than this after a few worlds."""
WARM_UP_WORLDS = 4
"""In which a process has not opened yet what it keeps."""
FEWEST_WORLDS = WARM_UP_WORLDS + 12
"""A process that has seen fewer says nothing about a leak: pools grow, and another driver has its own connections."""
_TAIL_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one process had open in one world, at the moment when it had the least."""

    attempt: int
    world_size: int
    descriptors: int
    kinds: dict[str, int]


@dataclass(kw_only=True)
class Holder:
    """A process and its samples, one for each world."""

    role: str
    pid: int
    samples: dict[int, Sample] = field(default_factory=dict[int, Sample])

    def split(self) -> tuple[list[Sample], list[Sample]]:
        """Return the first and the last third of the worlds after it has warmed up."""
        in_order = [self.samples[attempt] for attempt in sorted(self.samples)][WARM_UP_WORLDS:]
        third = len(in_order) // 3
        return in_order[:third], in_order[-third:] if third else []

    def find_growth(self) -> dict[str, int]:
        """Return by how much it certainly grew, by kind (all in "descriptors"): the least of the last, in worlds of one
        size, against the most of the first; of the sizes, the one that grew least."""
        first, last = self.split()
        growth: dict[str, int] = {}
        for size in {sample.world_size for sample in first} & {sample.world_size for sample in last}:
            before, after = ([s for s in samples if s.world_size == size] for samples in (first, last))
            for kind in {"descriptors", *(kind for s in after for kind in s.kinds)}:
                more = min(_count(s, kind) for s in after) - max(_count(s, kind) for s in before)
                growth[kind] = min(more, growth.get(kind, more))
        return growth

    def describe(self) -> dict[str, Any]:
        first, last = self.split()
        return {
            "role": self.role,
            "pid": self.pid,
            "worlds": len(self.samples),
            "first": [(s.world_size, s.descriptors, s.kinds.get("memory", 0)) for s in first],
            "last": [(s.world_size, s.descriptors, s.kinds.get("memory", 0)) for s in last],
            "growth": self.find_growth(),
        }


def _count(sample: Sample, kind: str) -> int:
    return sample.descriptors if kind == "descriptors" else sample.kinds.get(kind, 0)


class LeakWatch:
    """Looks at a folder's hosts, replica servers, trainers and coordinator once a second; a context manager.

    Args:
        folder: that of the processes (`find_processes`).
        metrics: the run's rows, which tell which world there is.
        say: is told of each new world.
    """

    def __init__(self, folder: Path, metrics: Path, *, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._metrics = metrics
        self._say = say
        self._holders: dict[tuple[int, str], Holder] = {}
        self._attempt = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="leaks", daemon=True)

    def __enter__(self) -> "LeakWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def long_lived(self) -> list[Holder]:
        """Those that have seen enough worlds to tell, by role."""
        found = [holder for holder in self._holders.values() if len(holder.samples) >= FEWEST_WORLDS]
        return sorted(found, key=lambda holder: (holder.role, holder.pid))

    def find_problems(self) -> list[str]:
        """Return what has grown, one line each."""
        return [
            f"{holder.role} {holder.pid} holds {more} more {kind} after {len(holder.samples)} worlds"
            for holder in self.long_lived
            for kind, more in holder.find_growth().items()
            if more > MOST_GROWTH
        ]

    def _watch(self) -> None:
        start_s = time.monotonic()
        while not self._end.wait(EVERY_S):
            row = read_last_row(self._metrics)
            if row is None:
                continue
            if row["attempt"] != self._attempt:
                self._attempt = row["attempt"]
                where = f"attempt {row['attempt']}, a world of {row['world_size']}, step {row['step']}"
                self._say(f"  {time.monotonic() - start_s:4.0f} s: {where}")
            for pid, command in find_processes(self._folder).items():
                if role := _find_role(pid, command):
                    with suppress(OSError):  # it has just ended
                        self._take(pid, role, row)

    def _take(self, pid: int, role: str, row: dict[str, Any]) -> None:
        process = find_running(pid)
        if process is None:
            return
        kinds = count_descriptors(pid)
        sample = Sample(
            attempt=row["attempt"], world_size=row["world_size"], descriptors=kinds.total(), kinds=dict(kinds)
        )
        holder = self._holders.setdefault((pid, process.started), Holder(role=role, pid=pid))
        known = holder.samples.get(sample.attempt)
        if known is None or sample.descriptors < known.descriptors:
            holder.samples[sample.attempt] = sample


def count_descriptors(pid: int) -> Counter[str]:
    """Return how many descriptors of each kind a process has open; "memory" is memory without a name (memfd)."""
    kinds: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            target = str(fd.readlink())
            kinds[_name_kind(target)] += 1
    return kinds


def _name_kind(target: str) -> str:
    if target.startswith("/memfd:"):
        return "memory"
    kind, colon, _ = target.partition(":")
    return f"{kind}s" if colon and not target.startswith("/") else "files"


def _find_role(pid: int, command: str) -> str:
    if "elastic.checkpoint.replicas.server" in command:
        return "replica server"
    if command.startswith("ray::Coordinator"):
        return "coordinator"
    if "cluster.runtime.node.host" not in command:
        return ""
    try:
        parent = Path(f"/proc/{get_parent(pid)}/cmdline").read_bytes()
    except OSError:
        return ""
    return "trainer" if b"cluster.runtime.node.host" in parent else "host"


def read_last_row(path: Path) -> dict[str, Any] | None:
    """Return the last whole row of a file of JSON lines, without reading all of it; None if there is none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
        with suppress(ValueError, IndexError):  # the first of the tail may be a part of one
            return json.loads(lines[-1])
    return None
