"""A real limit on the memory of real processes, as a container has one."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 2**20
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Limit:
    """A control group; what its processes take from now on counts."""

    def __init__(self, folder: Path, *, limit: str, used: str) -> None:
        self._folder, self._limit, self._used = folder, folder / limit, folder / used

    def set(self, num_bytes: int) -> None:
        """Change the limit."""
        self._limit.write_text(str(num_bytes))

    def add(self, pid: int) -> None:
        """Let it hold for a process and the children that it will have."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def get_used(self) -> int:
        """Return how many bytes count."""
        return int(self._used.read_text())

    def close(self) -> None:
        """Set the processes free that are left, and remove the group."""
        for pid in (self._folder / "cgroup.procs").read_text().split():
            (self._folder.parent / "cgroup.procs").write_text(pid)
        self._folder.rmdir()


@contextmanager
def limit_memory(num_bytes: int) -> Iterator[Limit]:
    """Yield a group with a limit; skip the test where this machine gives none out."""
    folder = (_V1 if _V1.exists() else _V2) / f"solvent-test-{uuid.uuid4().hex[:8]}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if _V1.exists() else ("memory.max", "memory.current")
    limit = Limit(folder, limit=names[0], used=names[1])
    try:
        folder.mkdir()
        limit.set(num_bytes)
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no memory limit can be set here: {error}")
    try:
        yield limit
    finally:
        limit.close()
