"""How much host memory is left for snapshots, on a machine of one's own or in a container. No torch here."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MOST_BUFFERS = 3
"""One holds the newest snapshot that has copies, one the newest that is whole, and one is filled."""
NUM_COPIES = 2
"""Of each shard at its peer: one that counts, and one that comes."""
WAYS = ((MOST_BUFFERS, NUM_COPIES), (2, NUM_COPIES), (2, 0), (1, 0))
"""How many buffers a rank has and how many copies of its shards its peer, the best first. While there is only one, a
state is gone as soon as the next begins to take its place: two of one's own count for more than copies."""


class MemoryBudget(NamedTuple):
    """What one rank sees of its node; plain numbers, so that all ranks can see those of all."""

    node: int
    """The same for all ranks of a node and no others."""
    first_bytes: int
    """What this rank has yet to take for the first snapshot of its world."""
    more_bytes: int
    """What it, and the copies of as many shards, will hold more than now; smaller buffers are given back after the
    first snapshot that is safe."""
    all_bytes: int
    """The same before any are given back."""
    left_bytes: int
    """What trainers that are gone have left on the node, which is given back then as well."""
    available_bytes: int


def fits_budgets(budgets: Iterable[MemoryBudget], *, spare_bytes: int) -> bool:
    """Tell whether every node has room for what all of its ranks need, now and later, and as much to spare.

    A node whose ranks need nothing any more has it.
    """
    return all(_fits_budget(ranks, spare_bytes) for ranks in _group(budgets))


def has_room_at_once(budgets: Iterable[MemoryBudget], *, spare_bytes: int) -> bool:
    """Tell whether every node has room for all snapshots before it gives any of earlier worlds back."""
    return all(_has_room_at_once(ranks, spare_bytes) for ranks in _group(budgets))


def _has_room_at_once(ranks: Sequence[MemoryBudget], spare_bytes: int) -> bool:
    return min(rank.available_bytes for rank in ranks) > sum(rank.all_bytes for rank in ranks) + spare_bytes


def _group(budgets: Iterable[MemoryBudget]) -> list[list[MemoryBudget]]:
    nodes: dict[int, list[MemoryBudget]] = {}
    for budget in budgets:
        nodes.setdefault(budget.node, []).append(budget)
    return list(nodes.values())


def _fits_budget(ranks: Sequence[MemoryBudget], spare_bytes: int) -> bool:
    first_bytes = sum(rank.first_bytes for rank in ranks)
    later_bytes = sum(rank.more_bytes for rank in ranks) - min(rank.left_bytes for rank in ranks)
    available_bytes = min(rank.available_bytes for rank in ranks)
    return first_bytes == 0 or available_bytes > max(first_bytes, later_bytes) + spare_bytes


def get_available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how much memory this process can still take; None where the kernel does not say.

    In a container that is not what the machine has left: a process that takes more than the limit is killed. As the
    machine does in MemAvailable, pages of files count as free, since the kernel drops them first; shared memory does
    not.

    Sources: proc_meminfo(5); the kernel's documentation of cgroup v2 ("Memory Interface Files") and v1 ("memory").
    """
    found = [_read_machine(proc), *_read_containers(proc, cgroups)]
    return min((num_bytes for num_bytes in found if num_bytes is not None), default=None)


def _read_machine(proc: Path) -> int | None:
    kib = _read_keys(proc / "meminfo").get("MemAvailable:")
    return None if kib is None else 1024 * kib


def _read_containers(proc: Path, cgroups: Path) -> Iterator[int | None]:
    """Yield what each limit above this process leaves."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            for group in _list_levels(cgroups, path):
                yield _read_v2(group)
        elif "memory" in controllers.split(","):
            for group in _list_levels(cgroups / "memory", path):
                yield _read_v1(group)


def _list_levels(root: Path, path: str) -> Iterator[Path]:
    """Yield a group and all that it lies in.

    A container may see the path as the machine names it, but have its own group mounted at the root.
    """
    relative = PurePosixPath(path.lstrip("/"))
    for level in (relative, *relative.parents):
        if ".." not in level.parts:  # outside of what this namespace shows
            yield root / level


def _read_v2(group: Path) -> int | None:
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _read_number(group / name)) is not None]
    used = _read_number(group / "memory.current")
    if not limits or used is None:
        return None
    stat = _read_keys(group / "memory.stat")
    return max(0, min(limits) - used + stat.get("active_file", 0) + stat.get("inactive_file", 0))


def _read_v1(group: Path) -> int | None:
    limit, used = _read_number(group / "memory.limit_in_bytes"), _read_number(group / "memory.usage_in_bytes")
    if limit is None or used is None:  # without a limit it is above any machine's memory
        return None
    stat = _read_keys(group / "memory.stat")
    return max(0, limit - used + stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0))


def _read_keys(path: Path) -> dict[str, int]:
    """Return the numbers behind the first words of a file's lines."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _read_number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
