"""A cluster as people build it from rented machines: `solvent nodes head` and `join`, held by one process each."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from elastic.processes import list_processes
from tests.ray._network import Network
from tests.ray._nodes import get_env
from tests.ray._runs import SOLVENT
from tests.ray._traces import find_processes, wait_until

SOLVENT_COMMAND = [sys.executable, "-c", SOLVENT]


class Rented:
    """One head and its nodes on this machine, with a token, ports and a folder of their own.

    Args:
        network: where the head is machine 0 and the nodes are as `join` says; None: all have this machine's address.
    """

    def __init__(self, folder: Path, *, env: dict[str, str] | None = None, network: Network | None = None) -> None:
        self.folder = folder
        self.network = network
        self.port, self.dashboard_port, self._agent_port = get_free_ports(3)
        self.env = {**get_env(folder), "HOME": str(folder), "RAY_TMPDIR": str(folder), **(env or {})}
        self.num_logs = 0
        self.head: subprocess.Popen[bytes] | None = None
        self.joined: list[subprocess.Popen[bytes]] = []

    @property
    def token(self) -> str:
        return (self.folder / ".ray" / "auth_token").read_text()

    @property
    def address(self) -> str:
        """Where nodes join and drivers connect."""
        return f"{self.network.get_ip(0) if self.network else get_own_ip()}:{self.port}"

    @property
    def driver_env(self) -> dict[str, str]:
        return dict(self.env)

    def enter(self, machine: int = 0) -> list[str]:
        """Return what goes before a command that shall run on a machine: the head, if none is named."""
        return self.network.enter(machine) if self.network else []

    def start_head(self) -> None:
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}"]
        agent = [f"--ray-arg=--dashboard-agent-listen-port={self._agent_port}"]
        own = [f"--ip={self.network.get_ip(0)}"] if self.network else []
        self.head = self._start("nodes", "head", *ports, *agent, *own)
        wait_until(self._is_up, timeout_s=180, what=self.get_output, every_s=0.3)

    def join(self, *words: str, env: dict[str, str] | None = None, machine: int = 0) -> subprocess.Popen[bytes]:
        # a folder of its own, as on a machine of its own: two nodes in one unpack a package over each other's
        agent = [f"--ray-arg=--dashboard-agent-listen-port={get_free_ports(1)[0]}"]
        agent += [f"--ray-arg=--temp-dir={self.folder}/n{self.num_logs}"]
        head = f"--head={self.address}"
        node = self._start("nodes", "join", head, "--cpus=1", "--gpus=0", *agent, *words, env=env, machine=machine)
        self.joined.append(node)
        log = self._get_log(self.num_logs)
        # two that start at one moment on one machine take each other's ports, and one of them starts again
        wait_until(lambda: "Ray runtime started" in log.read_text(), timeout_s=120, what=self.get_output, every_s=0.2)
        return node

    def kill_head(self) -> None:
        """End the head as a machine that is switched off: every process at once, without a word."""
        for pid in find_tree(self.head.pid):
            os.kill(pid, signal.SIGKILL)
        self.head.wait()

    def close(self) -> None:
        for process in [*self.joined, *([self.head] if self.head else [])]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
        for process in [*self.joined, *([self.head] if self.head else [])]:
            process.wait(60)

    def get_output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("node-*.log")))

    def _start(self, *words: str, env: dict[str, str] | None = None, machine: int = 0) -> subprocess.Popen[bytes]:
        self.num_logs += 1
        with self._get_log(self.num_logs).open("wb") as log:
            return subprocess.Popen(
                [*self.enter(machine), *SOLVENT_COMMAND, *words],
                env={**self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _get_log(self, number: int) -> Path:
        return self.folder / f"node-{number:02}.log"

    def _is_up(self) -> bool:
        assert self.head.poll() is None, self.get_output()
        if self.network:  # its dashboard is out of our reach
            return "Ray runtime started" in self._get_log(1).read_text()
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard_port}/api/version")
        try:
            request.add_header("Authorization", f"Bearer {self.token}")
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def get_own_ip() -> str:
    from cluster.runtime.ray.ray_start import find_own_ip

    return find_own_ip(None)


def get_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def find_tree(pid: int) -> list[int]:
    """Return a process and all that came from it, oldest first."""
    children: dict[int, list[int]] = {}
    for process in list_processes():
        children.setdefault(process.parent, []).append(process.pid)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


@contextmanager
def open_head(*, env: dict[str, str] | None = None, timeout_s: float = 120.0) -> Generator[Rented]:
    """Yield rented machines of which one is a head; in the end nothing of theirs runs within `timeout_s`."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    rented = Rented(folder, env=env)
    try:
        rented.start_head()
        yield rented
    finally:
        rented.close()
        left = partial(find_processes, folder)
        wait_until(lambda: not left(), timeout_s=timeout_s, what=lambda: f"left: {left()}")
        shutil.rmtree(folder)  # with what those who were killed left there
