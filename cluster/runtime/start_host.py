"""Start the host of a node from any Ray worker on it, or find it running."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from elastic.errors import SolventError

SUBREAPER = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"


def get_host_folder(node: str, coordinator: str) -> Path:
    """Return the folder of a node's host: short, because a Unix socket's path ends at 107 characters."""
    return Path(tempfile.gettempdir()) / f"solvent-{os.getuid()}-{coordinator}-{node[:12]}"


def start_host(node: str, fields: dict[str, Any]) -> Path:
    """Start this node's host unless there is one; return its folder. Runs on the node, inside a Ray worker.

    A worker that has lost its raylet is about to end, and no host can live there any more: it starts none.

    Raises:
        SolventError: the raylet is set to adopt and kill what its workers leave behind; no daemon survives that.
    """
    from ray.util import get_node_ip_address  # noqa: PLC0415 (`solvent doctor` reads this file without Ray)

    if os.environ.get(SUBREAPER, "0").lower() in ("1", "true"):
        raise SolventError(
            f"{SUBREAPER} is set on this node: Ray would kill the host, which must outlive its workers. "
            "Start Ray without that variable."
        )
    fields = dict(fields)
    folder = get_host_folder(node, fields.pop("coordinator"))
    raylet_pid = int(os.environ["RAY_RAYLET_PID"])
    if not _is_running(raylet_pid):
        return folder
    spec = {
        **fields,
        "node": node,
        "node_ip": get_node_ip_address(),
        "folder": str(folder),
        "raylet_pid": raylet_pid,
    }
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "MKL_"))}
    env.pop("CUDA_VISIBLE_DEVICES", None)  # each trainer gets its own from the agent that claims its slot
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with (folder / "host.log").open("ab") as log:
        subprocess.run(
            [sys.executable, "-m", "cluster.runtime.host"],
            input=json.dumps(spec).encode(),
            stdout=log,
            stderr=log,
            env=env,
            check=True,
        )
    return folder


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # ended, but not yet reaped by its parent
