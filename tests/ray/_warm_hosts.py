"""Hosts forked from a process that has imported and used torch once: seconds of each start.

All but the start of Python and the imports is as in `python -m cluster.runtime.node.host`, which `launch_host` calls.
"""

import atexit
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cluster.runtime.node import host
from cluster.runtime.node.daemon import READY

ROOT = Path(__file__).parents[2]
NAME = "cluster.runtime.node.host"
"""In the command line of hosts, by which tests find them."""


class _WarmHosts:
    """This end of the process that hosts are forked from; it ends with ours."""

    def __init__(self) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray._warm_hosts", NAME],
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        atexit.register(self._process.communicate)  # it ends with its input

    def start(self, spec: Mapping[str, Any], env: Mapping[str, str]) -> str:
        """Return what a new host says until it listens."""
        with tempfile.TemporaryDirectory(prefix="warm-") as folder:
            said = Path(folder, "said")
            os.mkfifo(said)
            request = {"spec": json.dumps(spec), "env": dict(env), "said": str(said)}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return said.read_text()


@cache
def _open_warm_hosts() -> _WarmHosts:
    return _WarmHosts()


def start_warm_host(spec: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Start a host as `launch_host` does; return once it listens."""
    said = _open_warm_hosts().start(spec, env)
    assert said.splitlines()[-1:] == [READY], said


def _serve() -> None:
    from cluster.runtime.trainers import trainer

    trainer.rehearsal.warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if pid := os.fork():
            os.waitpid(pid, 0)  # it leaves the host behind
        else:
            said = os.open(request["said"], os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.close(said)
            os.environ.clear()
            os.environ.update(request["env"])
            sys.stdin = io.StringIO(request["spec"])
            host.main()
            os._exit(0)


if __name__ == "__main__":
    _serve()
