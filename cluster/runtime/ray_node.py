"""Hold one machine's Ray node: start `ray start`, keep it running, and end it cleanly within the machine's notice.

Only the command is Ray's; nothing of Ray is imported. The node watch, an actor that the run's coordinator puts on every
node, reads the notices; here a SIGTERM is handed to `ray start`, whose own drain is set to what the machine grants.
"""

import contextlib
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.notices import get_drain_s
from cluster.providers import RAY_SETTING
from cluster.runtime.ray_token import MODE
from elastic.errors import ConfigError

PORT = 6379
DASHBOARD_PORT = 8265
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # ours carries nothing; 75 MiB is the least that Ray takes
_LOOK_S = 0.5
_FIRST_BACKOFF_S = 1.0
_MOST_BACKOFF_S = 30.0
_HEALTHY_S = 60.0
_WITHDRAWN_S = 30.0
"""A machine that still lives so long after the end it announced is there to stay."""
_LET_GO_S = 1.5
"""A watch that is gone for so long was taken away, and not started anew."""
_KILL_S = 1.0
"""What the end of the processes themselves takes."""
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RECONNECT_S = "20"
"""A head gives up a node that is silent for about so long; Ray's 60 s would keep the node from the next head."""
_DRAINED = re.compile(rb"Drain raylet RPC has received\. Deadline is (\d+)\.")
"""In the raylet's log; tests/ray/test_submit.py holds Ray 2.60 to it."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """What to start, and for how long it may take its leave."""

    command: Sequence[str]
    env: Mapping[str, str]
    head: tuple[str, int] | None
    """Where it joins; None for the head itself."""
    grace_s: float


def plan_head(
    *, ip: str, port: int, dashboard_port: int, labels: Mapping[str, str], ray_args: Sequence[str]
) -> list[str]:
    """Return the command of a head: it holds driver and coordinator and trains nothing; the dashboard stays inside."""
    return [
        *(*_get_ray(), "--head", f"--node-ip-address={ip}", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--num-cpus=0", "--num-gpus=0"),
        *_get_common(labels),
        *ray_args,
    ]


def plan_worker(
    *,
    head: tuple[str, int],
    ip: str,
    cpus: int | None,
    gpus: int | None,
    labels: Mapping[str, str],
    ray_args: Sequence[str],
) -> list[str]:
    """Return the command of a node that trains; None: as many as Ray finds."""
    return [
        *(*_get_ray(), f"--address={head[0]}:{head[1]}", f"--node-ip-address={ip}"),
        *([] if cpus is None else [f"--num-cpus={cpus}"]),
        *([] if gpus is None else [f"--num-gpus={gpus}"]),
        *_get_common(labels),
        *ray_args,
    ]


def build_env(env: Mapping[str, str], *, grace_s: float) -> dict[str, str]:
    """Return the environment of `ray start`: tokens on, our commands on its PATH, and a drain of the true length."""
    return {
        MODE: "token",
        _RECONNECT: _RECONNECT_S,
        **env,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}",
        RAY_SETTING: f"{get_drain_s(grace_s):g}",
    }


def build_labels(*, provider: str, market: str, zone: str, offer: str) -> dict[str, str]:
    """Return the labels of a node; what is not known is left out."""
    gpu = _find_gpu()
    offer = offer or "-".join(part for part in (provider, market, gpu) if part)
    labels = {
        "solvent-offer": offer,
        "solvent-provider": provider,
        "ray.io/market-type": market,
        "ray.io/availability-zone": zone,
    }
    return {key: fit for key, value in labels.items() if (fit := _UNFIT.sub("-", value)[:63].strip("-._"))}


def find_own_ip(head: tuple[str, int] | None) -> str:
    """Return the address of the interface that leads to the head (or out of here, for a head)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(head or ("192.0.2.1", 9))  # sends nothing; 192.0.2.0/24 is for examples
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def check_private(name: str, host: str) -> None:
    """Refuse an address that all the internet can reach: Ray's ports have a token, but no encryption.

    Raises:
        ConfigError: it is public, or there is no such host.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError as error:
        raise ConfigError(f"{name}={host} is no address that is known here ({error}). Give the private one.") from error
    if public := sorted(address for address in found if ipaddress.ip_address(address).is_global):
        raise ConfigError(
            f"{name}={host} is a public address ({public[0]}): Ray's traffic is not encrypted, and whoever reads it "
            "has the token. Use the provider's private network or a VPN (k8s/RENTED.md), or say --public if a firewall "
            "admits your nodes only."
        )


def parse_head(address: str) -> tuple[str, int]:
    """Return host and port of the head.

    Raises:
        ConfigError: neither HOST nor HOST:PORT.
    """
    host, _, port = address.partition(":")
    if not host or "/" in address or (port and not port.isdecimal()):
        raise ConfigError(f"--head={address} is no address. Give HOST or HOST:PORT, such as 10.0.0.5:{PORT}.")
    return host, int(port or PORT)


def hold(plan: NodePlan, *, say: Callable[[str], None]) -> int:
    """Keep the node in its cluster until SIGTERM or Ctrl-C; return 0 if it left in time.

    A node that ends by itself is started again: its head was lost, or it drained and the machine is still there.
    """
    told = _Signals()
    backoff_s = _FIRST_BACKOFF_S
    while not told.leave.is_set():
        if not _wait_for_head(plan, told, say):
            break
        start_s = time.monotonic()
        process = subprocess.Popen(plan.command, env=dict(plan.env), stdin=subprocess.DEVNULL)
        node = _Node(process)
        while node.is_alive() and not told.leave.wait(_LOOK_S):
            pass
        if told.leave.is_set():
            return _leave(node, plan, told, say)
        code = process.poll()
        node.kill()
        pause_s = backoff_s
        if deadline_s := node.find_drain_deadline():
            pause_s = max(0.0, deadline_s - time.time()) + _WITHDRAWN_S
            say(f"this node was drained; if the machine is still here in {pause_s:.0f} s, it joins again")
        else:
            why = "its daemon ended" if code is None else f"exit code {code}"
            say(f"Ray ended here ({why}; its logs say more); starting it again in {pause_s:.0f} s")
        lived_s = time.monotonic() - start_s
        backoff_s = _FIRST_BACKOFF_S if lived_s > _HEALTHY_S else min(2 * backoff_s, _MOST_BACKOFF_S)
        told.leave.wait(pause_s)
    return 0


class _Signals:
    """SIGTERM or Ctrl-C: leave; a second one: at once."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.at_once = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, *_: object) -> None:
        (self.at_once if self.leave.is_set() else self.leave).set()


class _Node:
    """The processes of one `ray start --block`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._raylet = 0
        self._log: Path | None = None

    def is_alive(self) -> bool:
        """Whether command and raylet run; the command outlives a raylet that has drained."""
        if self.process.poll() is not None:
            return False
        if not self._raylet:
            self._raylet = _find_child(self.process.pid, "raylet")
            if self._raylet:
                with contextlib.suppress(OSError):  # it has just ended
                    self._log = Path(f"/proc/{self._raylet}/fd/1").readlink()
            return True
        return _get_name(self._raylet) == "raylet"

    def is_watched(self) -> bool:
        """Whether a run's watch is here: its coordinator takes it away once the run needs nothing of this node."""
        return any(command.startswith(b"ray::WatchActor") for command in _find_commands(self._raylet))

    def end_raylet(self) -> None:
        """Take the node out of its cluster at once; the command ends with it."""
        if self._raylet and _get_name(self._raylet) == "raylet":
            os.kill(self._raylet, signal.SIGTERM)

    def find_drain_deadline(self) -> float | None:
        """Return the Unix time at which Ray was told that this node would be gone."""
        try:
            found = _DRAINED.findall(self._log.read_bytes()) if self._log else []
        except OSError:
            return None
        return int(found[-1]) / 1000 if found else None

    def kill(self) -> None:
        """End all that is left: they are one process group, made by Ray."""
        if self.process.poll() is None and os.getpgid(self.process.pid) == self.process.pid:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _leave(node: _Node, plan: NodePlan, told: _Signals, say: Callable[[str], None]) -> int:
    deadline_s = time.monotonic() + plan.grace_s - _KILL_S
    say(f"leaving: this node drains, and is gone in {plan.grace_s:g} s at the latest (a second signal: at once)")
    was_watched = node.is_watched()
    node.process.send_signal(signal.SIGTERM)
    gone_s = time.monotonic()
    while node.process.poll() is None and time.monotonic() < deadline_s and not told.at_once.wait(_LOOK_S):
        if node.is_watched():
            gone_s = time.monotonic()
        elif was_watched and time.monotonic() - gone_s > _LET_GO_S:
            node.end_raylet()  # it would wait for Ray Train's worker, which stays where it is
    in_time = node.process.poll() is not None
    node.kill()
    say("left" if in_time else "left at the deadline, before all that ran here had moved on")
    return 0 if in_time else 1


def _wait_for_head(plan: NodePlan, told: _Signals, say: Callable[[str], None]) -> bool:
    """Return once the head takes connections; False if this node is to leave before."""
    is_said = False
    while plan.head and not told.leave.is_set():
        try:
            socket.create_connection(plan.head, timeout=5.0).close()
            return True
        except OSError as error:
            if not is_said:
                say(f"the head at {plan.head[0]}:{plan.head[1]} does not answer ({error}); trying again until it does")
                is_said = True
            told.leave.wait(2.0)
    return not told.leave.is_set()


def _get_ray() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]


def _get_common(labels: Mapping[str, str]) -> list[str]:
    made = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    return [*made, f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else made


def _find_child(pid: int, name: str) -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = stat.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        if before.partition("(")[2] == name and int(after.split()[1]) == pid:
            return int(stat.parent.name)
    return 0


def _find_commands(parent: int) -> list[bytes]:
    """Return the command lines of a process's children."""
    found: list[bytes] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append((stat.parent / "cmdline").read_bytes())
    return found


def _get_name(pid: int) -> str:
    """Return the name of a living process; empty if it has ended."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]


def _find_gpu() -> str:
    """Return the model of the first GPU, from the driver's own tool; empty without one."""
    if not (tool := shutil.which("nvidia-smi")):
        return ""
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.partition("\n")[0].strip().removeprefix("NVIDIA ") if done.returncode == 0 else ""
