"""What a host must know to start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """JSON on its standard input, so that the secret is in no process list."""

    node: str
    node_ip: str
    folder: str
    """Socket, lock and logs of this host, which makes it and removes it when it ends."""
    coordinator_address: CoordinatorAddress
    """Of its coordinator."""
    raylet_pid: int
    secret: str
    """The coordinator knows it, and whoever follows it."""
    lease_s: float
    config: dict[str, Any]
    """What its trainers train, as `dataclasses.asdict` made it."""
    disk: str = ""
    """Folder of this run on a disk of the node's own, for snapshots; empty: there is none."""


def get_replica_folder(folder: Path) -> Path:
    """Return where trainers find the replica server of a host's node, from the host's own folder."""
    return folder / "replicas"
