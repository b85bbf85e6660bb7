"""What a rented machine starts to be a head or a node: the command, its environment, labels and addresses.

Only the command is Ray's; nothing of Ray is imported.
"""

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.notices import get_drain_s
from cluster.providers import RAY_SETTING
from cluster.runtime.ray.ray_token import MODE
from cluster.types import RAY_HEAD_ENV
from elastic.errors import ConfigError

PORT = 6379
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # ours carries nothing; 75 MiB is the least that Ray takes
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RECONNECT_S = "20"
"""A head gives up a node that is silent for about so long; Ray's 60 s would keep the node from the next head."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


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
        **RAY_HEAD_ENV,
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


def _get_ray() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]


def _get_common(labels: Mapping[str, str]) -> list[str]:
    made = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    return [*made, f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else made


def _find_gpu() -> str:
    """Return the model of the first GPU, from the driver's own tool; empty without one."""
    if not (tool := shutil.which("nvidia-smi")):
        return ""
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.partition("\n")[0].strip().removeprefix("NVIDIA ") if done.returncode == 0 else ""
