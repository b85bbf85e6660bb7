"""Start the host of a node from any Ray worker on it, or find it running."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import Abandoned
from cluster.runtime.node.connect import connect, tell_address
from cluster.runtime.node.daemon import READY
from elastic.errors import SolventError
from elastic.processes import find_running

SUBREAPER = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
_RUN_DIGITS = 8
_MOST_TOLD = 2000
"""Characters of what a host says before it ends."""


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
        if link := connect(older):
            link.send(Abandoned())
            link.close()


def start_host(node: str, fields: dict[str, Any]) -> None:
    """Have a host on this node, started now unless there is one; return once it listens and knows its coordinator.

    Runs on the node, inside a Ray worker. A worker that has lost its raylet is about to end, and no host can live there
    any more: it starts none.

    Args:
        fields: as `Coordinator.get_host_fields` returns them.

    Raises:
        SolventError: it could not start; or the raylet is set to adopt and kill what its workers leave behind, which no
            daemon survives.
    """
    from cluster.runtime.ray import adapter  # noqa: PLC0415 (`solvent doctor` reads this file without Ray)

    if os.environ.get(SUBREAPER, "0").lower() in ("1", "true"):
        raise SolventError(
            f"{SUBREAPER} is set on this node: Ray would kill the host, which must outlive its workers. "
            "Start Ray without that variable."
        )
    fields = dict(fields)
    session = fields.pop("session")
    folder = get_host_folder(node, session)
    raylet_pid = adapter.get_raylet_pid()
    if not find_running(raylet_pid) or tell_address(folder, CoordinatorAddress(**fields["coordinator_address"])):
        return
    _end_older(folder, session)
    facts = {"node": node, "node_ip": adapter.get_own_ip(), "folder": str(folder), "raylet_pid": raylet_pid}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "MKL_"))}
    env.pop("CUDA_VISIBLE_DEVICES", None)  # each trainer gets its own from the agent that claims its slot
    launch_host({**fields, **facts}, env)


def launch_host(spec: dict[str, Any], env: Mapping[str, str]) -> None:
    """Start the daemon; return once it listens, or another one in its folder does.

    Args:
        spec: a `HostSpec`, for JSON.
        env: of the daemon, which finds modules where this process does.

    Raises:
        SolventError: it ended before that.
    """
    command = [sys.executable, "-m", "cluster.runtime.node.host"]
    path = os.pathsep.join(path for path in sys.path if path)
    ended = subprocess.run(
        command,
        input=json.dumps(spec),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**env, "PYTHONPATH": path},
        check=False,
    )
    if ended.stdout.splitlines()[-1:] != [READY]:
        raise SolventError(f"no host could start in {spec['folder']}: {ended.stdout.strip()[-_MOST_TOLD:]}")
