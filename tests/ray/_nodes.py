"""A `LocalCluster` in a process of its own, led line by line: Ray wants nodes started in a main thread.

As a script it reads commands (`add`, `remove NODE`, `raylet NODE`, `drain NODE SECONDS`) and answers each with a line
of JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
PACED = {"PACED_STEP_S": "0.05", "PYTHONPATH": f"{ROOT / 'tests' / 'ray' / '_paced'}{os.pathsep}{ROOT}"}
"""The environment in which a step of a host's trainers takes some time besides computing."""


class Nodes:
    """The test's end of the pipe.

    Args:
        is_measured: trainers take all the time that they want, as on machines of their own. By default they leave most
            of it to what starts and ends around them: on two cores a node is then there in a third of the time.
    """

    def __init__(
        self, folder: Path, *, num_nodes: int, env: Mapping[str, str] | None = None, is_measured: bool = False
    ) -> None:
        self.folder = folder
        self._log = (folder / "cluster.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(num_nodes), "training" if is_measured else "joining"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**get_env(folder), **({} if is_measured else PACED), **(env or {})},
        )
        answer = self._read()
        self.address: str = answer["address"]
        self.ids: list[str] = answer["nodes"]
        self.driver_env = get_env(folder)

    def enter(self) -> list[str]:
        """Return what goes before a driver's command: nothing, it runs on this machine."""
        return []

    def add(self) -> str:
        node = self._ask("add")["node"]
        self.ids.append(node)
        return node

    def remove(self, node: str) -> None:
        """Kill a node."""
        self._ask("remove", node)
        self.ids.remove(node)

    def get_raylet(self, node: str) -> int:
        """Return the process id of a node's Ray daemon."""
        return self._ask("raylet", node)["pid"]

    def drain(self, node: str, *, notice_s: float) -> None:
        """Give notice; the node stays until it is removed."""
        self._ask("drain", node, str(notice_s))

    def close(self) -> None:
        """End the cluster; what it printed is gone with it."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)
        self._log.close()
        (self.folder / "cluster.log").unlink()

    def _ask(self, *words: str) -> dict:
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"the cluster ended:\n{(self.folder / 'cluster.log').read_text()}"
        return json.loads(line)


@contextmanager
def open_nodes(num_nodes: int, *, env: Mapping[str, str] | None = None, is_measured: bool = False) -> Generator[Nodes]:
    """Yield a cluster in a folder of its own, in which nothing may be left."""
    from tests.ray._traces import assert_nothing_left, wait_until

    unused = find_unused_memory()
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    nodes = Nodes(folder, num_nodes=num_nodes, env=env, is_measured=is_measured)
    try:
        yield nodes
    finally:
        nodes.close()
        assert_nothing_left(folder)
        wait_until(lambda: find_unused_memory() <= unused, timeout_s=5, what=lambda: f"left: {find_unused_memory()}")
        shutil.rmtree(folder)


def find_unused_memory() -> set[str]:
    """Return the files in /dev/shm that no living process uses: other runs on this machine have theirs there, too."""
    used: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
            used |= {
                line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if f" {SHARED_MEMORY}/" in line
            }
    return {str(path) for path in SHARED_MEMORY.iterdir()} - used


def get_env(folder: Path) -> dict[str, str]:
    """Return the environment that marks a process as one of this folder's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    return {**kept, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _serve(num_nodes: int, favour: Literal["training", "joining"]) -> None:
    from cluster.runtime.ray import adapter
    from cluster.runtime.ray.local_cluster import LocalCluster
    from elastic.config import ClusterConfig

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints must not get between the answers
    is_connected = False
    with LocalCluster(num_nodes=num_nodes, favour=favour) as cluster:
        print(json.dumps({"address": cluster.address, "nodes": cluster.nodes}), file=answers, flush=True)
        for line in sys.stdin:
            answer: dict[str, object] = {}
            match line.split():
                case ["add"]:
                    answer["node"] = cluster.add_node()
                case ["remove", node]:
                    cluster.remove_node(node)
                case ["raylet", node]:
                    answer["pid"] = cluster.get_raylet(node)
                case ["drain", node, notice_s]:
                    if not is_connected:
                        adapter.connect(cluster.address, ClusterConfig())
                        is_connected = True
                    adapter.drain_node(node, reason="spot", deadline_s=time.time() + float(notice_s))
                case words:
                    raise ValueError(f"unknown command {words}")
            print(json.dumps(answer), file=answers, flush=True)
        if is_connected:
            adapter.disconnect()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), "training" if sys.argv[2:] == ["training"] else "joining")
