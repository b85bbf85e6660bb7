"""Start the host of a node from any Ray worker on it, or find it running."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.runtime.link import Link
from cluster.runtime.seat import Seat, write_seat
from elastic.errors import SolventError

SUBREAPER = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
_RUN_DIGITS = 8


def new_session(run_digest: str) -> str:
    """Return a name for the hosts of one run, other than those that it may have had before.

    Args:
        run_digest: 8 digits that mean the run.
    """
    assert len(run_digest) == _RUN_DIGITS
    return run_digest + secrets.token_hex(4)


def get_host_folder(node: str, session: str) -> Path:
    """Return the folder of a node's host: short, because a Unix socket's path ends at 107 characters."""
    return Path(tempfile.gettempdir()) / f"solvent-{os.getuid()}-{session}-{node[:12]}"


def find_older(folder: Path, session: str) -> list[Path]:
    """Return the folders of hosts on the node that were this run's in sessions before."""
    pattern = folder.name.replace(session, f"{session[:_RUN_DIGITS]}*")
    return [found for found in folder.parent.glob(pattern) if found != folder]


def _end_older(folder: Path, session: str) -> None:
    """Tell hosts that the run had before that nobody will come for them: they are in the way of this one."""
    for older in find_older(folder, session):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(older / "socket"))
            Link(sock).send("abandoned")


def start_host(node: str, fields: dict[str, Any]) -> Path:
    """Start this node's host unless there is one; return its folder. Runs on the node, inside a Ray worker.

    Either way the host learns where its coordinator is, which may be another one than before. A worker that has lost
    its raylet is about to end, and no host can live there any more: it starts none.

    Args:
        fields: as `Coordinator.get_host_fields` returns them.

    Raises:
        SolventError: the raylet is set to adopt and kill what its workers leave behind; no daemon survives that.
    """
    from cluster.runtime import adapter  # noqa: PLC0415 (`solvent doctor` reads this file without Ray)

    if os.environ.get(SUBREAPER, "0").lower() in ("1", "true"):
        raise SolventError(
            f"{SUBREAPER} is set on this node: Ray would kill the host, which must outlive its workers. "
            "Start Ray without that variable."
        )
    fields = dict(fields)
    session, seat = fields.pop("session"), Seat(**fields.pop("seat"))
    folder = get_host_folder(node, session)
    raylet_pid = adapter.get_raylet_pid()
    if not _is_running(raylet_pid):
        return folder
    spec = {
        **fields,
        "node": node,
        "node_ip": adapter.get_own_ip(),
        "folder": str(folder),
        "raylet_pid": raylet_pid,
    }
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_seat(folder, seat)
    _end_older(folder, session)
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
