"""Machines on this one, as far as the network goes: each in a namespace of its own with its own address, on one bridge.

A machine that is cut off is a black hole: its packets and those to it vanish, no connection ends, nobody is told.
The namespaces have no names: they and their links end with the processes in them, and so with the test, however that
ends.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.ray._traces import wait_until

_BRIDGE = "br0"


class NoNetworkError(Exception):
    """This machine cannot have such machines on it."""


class Network:
    """Machines 0 (the bridge is there) to `num_machines` - 1; a context manager."""

    def __init__(self, num_machines: int) -> None:
        if missing := [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]:
            raise NoNetworkError(f"{', '.join(missing)} is not here: install iproute2 and util-linux")
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            self._build(num_machines)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_ip(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def enter(self, machine: int) -> list[str]:
        """Return what goes before a command that shall run there, under the process id that it is started with."""
        return ["nsenter", f"--net={self._get_path(machine)}"]

    def holds(self, machine: int, pid: int) -> bool:
        """Tell whether a process is on this machine."""
        return Path(f"/proc/{pid}/ns/net").samefile(self._get_path(machine))

    def cut(self, machine: int) -> None:
        """Let all that this machine sends, or is sent, vanish from now on."""
        self._ip(0, "link", "set", f"n{machine}", "down")

    def mend(self, machine: int) -> None:
        self._ip(0, "link", "set", f"n{machine}", "up")

    def close(self) -> None:
        for holder in self._holders:
            holder.stdin.close()
            holder.wait()

    def _build(self, num_machines: int) -> None:
        for machine in range(num_machines):
            self._hold()
            self._ip(machine, "link", "set", "lo", "up")
        self._ip(0, "link", "add", _BRIDGE, "type", "bridge")
        self._ip(0, "address", "add", f"{self.get_ip(0)}/24", "dev", _BRIDGE)
        self._ip(0, "link", "set", _BRIDGE, "up")
        for machine in range(1, num_machines):
            own, there = f"n{machine}", ("eth0", "netns", str(self._holders[machine].pid))
            self._ip(0, "link", "add", own, "type", "veth", "peer", "name", *there)
            self._ip(0, "link", "set", own, "master", _BRIDGE, "up")
            self._ip(machine, "address", "add", f"{self.get_ip(machine)}/24", "dev", "eth0")
            self._ip(machine, "link", "set", "eth0", "up")

    def _hold(self) -> None:
        """Start a process that holds a new namespace until its standard input ends."""
        holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._holders.append(holder)
        with holder.stderr:

            def is_there() -> bool:
                if holder.poll() is not None:
                    raise NoNetworkError(f"no network namespace: {holder.stderr.read().decode().strip()}")
                return (Path(f"/proc/{holder.pid}/comm").read_text().strip()) == "cat"

            wait_until(is_there, timeout_s=30, what="a network namespace")

    def _get_path(self, machine: int) -> str:
        return f"/proc/{self._holders[machine].pid}/ns/net"

    def _ip(self, machine: int, *words: str) -> None:
        command: Sequence[str] = [*self.enter(machine), "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNetworkError(f"`ip {' '.join(words)}` says: {done.stderr.strip()}")
