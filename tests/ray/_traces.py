"""What a test has left behind. Never found by name: other runs may be at work on this machine.

All processes of a test have its folder as TMPDIR in their environment or, where Ray has written a title over that,
hold files below it open. Ports go with their processes; what they write is below the folder.
"""

import os
import time
from pathlib import Path


def find_processes(folder: Path) -> dict[int, str]:
    """Return the command lines of the living processes that belong to a folder, by process id."""
    found: dict[int, str] = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if int(proc.name) != os.getpid() and _belongs(proc, str(folder)):
                found[int(proc.name)] = (proc / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
            continue
    return found


def _belongs(proc: Path, folder: str) -> bool:
    if (proc / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
        return False
    if f"TMPDIR={folder}\0".encode() in (proc / "environ").read_bytes():
        return True
    return any(fd.readlink().is_relative_to(folder) for fd in (proc / "fd").iterdir())


def get_parent(pid: int) -> int:
    """Return the id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def find_hosts(folder: Path) -> list[int]:
    """Return the hosts among a folder's processes."""
    return [pid for pid in _find_host_like(folder) if not _is_trainer(pid)]


def find_trainers(folder: Path) -> list[int]:
    """Return the trainers among a folder's processes: a host's children, under its command line."""
    return [pid for pid in _find_host_like(folder) if _is_trainer(pid)]


def find_agents(folder: Path) -> list[int]:
    """Return the agents among a folder's processes: the workers that Ray Train counts and restarts."""
    return [pid for pid, command in find_processes(folder).items() if "ray::RayTrainWorker" in command]


def find_replica_servers(folder: Path) -> list[int]:
    """Return the replica servers of snapshots among a folder's processes."""
    return [pid for pid, command in find_processes(folder).items() if "elastic.checkpoint.replicas.server" in command]


def find_at_work(folder: Path) -> tuple[list[int], list[int], list[int]]:
    """Return a folder's hosts, replica servers and trainers: those who must outlive what else dies."""
    return find_hosts(folder), find_replica_servers(folder), find_trainers(folder)


def get_node(trainer: int) -> str:
    """Return the first digits of the node that a trainer is on."""
    log = Path(f"/proc/{trainer}/fd/1").readlink()
    return log.parent.name.rpartition("-")[2]


def _find_host_like(folder: Path) -> list[int]:
    return sorted(pid for pid, command in find_processes(folder).items() if "cluster.runtime.node.host" in command)


def _is_trainer(pid: int) -> bool:
    try:
        return b"cluster.runtime.node.host" in Path(f"/proc/{get_parent(pid)}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def is_alive(pid: int) -> bool:
    """Tell whether a process runs (one that could be reaped does not; it cannot before its last thread has ended)."""
    try:
        is_zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not is_zombie or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except FileNotFoundError:
        return False


def wait_until(condition, *, timeout_s: float, what: str, every_s: float = 0.05):
    """Return the condition's first true value; fail with what was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what() if callable(what) else what}"
        time.sleep(every_s)
    return value


def assert_nothing_left(folder: Path, *, timeout_s: float = 60.0) -> None:
    """Fail if processes, sockets or files of a test outlive it."""
    wait_until(lambda: not find_processes(folder), timeout_s=timeout_s, what=lambda: f"left: {find_processes(folder)}")
    # torch keeps a cache of compiled code there, for all programs of the user
    left = [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]
    assert not left, f"left in {folder}: {left}"
