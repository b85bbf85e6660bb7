"""A real Ray cluster of several nodes on this machine: what the demo, chaos runs and tests train on."""

import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from cluster.runtime.node.priority import AHEAD_VARIABLE
from cluster.types import RAY_HEAD_ENV
from elastic.errors import SolventError

_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # ours carries nothing; 75 MiB is the least that Ray takes
_START_TRIES = 3
_FAVOURS_JOINING = {"RAY_worker_niceness": "1", AHEAD_VARIABLE: "1"}
"""Workers as good as beside Ray's daemons (by itself Ray starts them at 15), and trainers less far ahead of both."""


@contextmanager
def _environment(settings: Mapping[str, str]) -> Generator[None]:
    """Have daemons that are started meanwhile find these variables, where the user has not set them."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class LocalCluster:
    """A head without CPUs and some worker nodes, each with a raylet of its own; ends with its `with` block.

    Args:
        favour: who gets more of the machine's time. Ray's daemons and workers start for seconds whenever a node is to
            come; behind the trainers of all other nodes, and beside whatever else computes here, that takes minutes.
    """

    def __init__(
        self, *, num_nodes: int, cpus_per_node: int = 1, favour: Literal["training", "joining"] = "training"
    ) -> None:
        self._env = _FAVOURS_JOINING if favour == "joining" else {}
        self._cpus_per_node = cpus_per_node
        self._temp_dir = tempfile.mkdtemp(prefix="sv-")  # short: Unix sockets lie deep below it
        self._outer_temp_dir = os.environ.get("RAY_TMPDIR")
        # The cluster's address file, too, goes there: `ray.init` elsewhere on this machine must not find this cluster.
        os.environ["RAY_TMPDIR"] = self._temp_dir
        (Path(self._temp_dir) / "ray").mkdir()
        logging.getLogger("ray").setLevel(logging.WARNING)
        head: dict[str, Any] = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        with _environment({**RAY_HEAD_ENV, **self._env}):  # read by the head's daemons, and by them alone
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        self._started: list[str] = []
        for _ in range(num_nodes):
            self.add_node()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._cluster.shutdown()
        del os.environ["RAY_TMPDIR"]
        if self._outer_temp_dir is not None:
            os.environ["RAY_TMPDIR"] = self._outer_temp_dir
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where a driver connects."""
        address = self._cluster.address
        assert address is not None  # only before there is a head
        return address

    @property
    def nodes(self) -> list[str]:
        """Ids of the living worker nodes, oldest first."""
        return [node for node in self.nodes_by_index if node is not None]

    @property
    def nodes_by_index(self) -> list[str | None]:
        """Every worker node ever started, oldest first; None in the place of one that is gone."""
        return [node if node in self._nodes and self._is_alive(node) else None for node in self._started]

    def get_raylet(self, node: str) -> int:
        """Return the process id of a node's Ray daemon."""
        return self._nodes[node].all_processes[PROCESS_TYPE_RAYLET][0].process.pid

    def _is_alive(self, node: str) -> bool:
        """Tell whether a node's Ray daemon runs: one that comes back after Ray gave its node up ends itself."""
        return all(kind != PROCESS_TYPE_RAYLET for kind, _ in self._nodes[node].dead_processes())

    def add_node(self) -> str:
        """Start one more worker node and return its id once Ray knows it.

        Raises:
            SolventError: it does not start, however often that is tried.
        """
        problem: Exception | None = None
        for _ in range(_START_TRIES):
            try:
                with _environment(self._env):
                    node = self._cluster.add_node(num_cpus=self._cpus_per_node, object_store_memory=_OBJECT_STORE_BYTES)
            except Exception as error:  # Ray has no type of its own for a node that is too slow to start
                problem = error
                continue
            self._nodes[node.node_id] = node
            self._started.append(node.node_id)
            return node.node_id
        raise SolventError(
            f"a local Ray node did not start in {_START_TRIES} tries ({problem}). This machine may be too busy: "
            "end what else runs on it, then start the same command again."
        ) from problem

    def remove_node(self, node: str) -> None:
        """Kill a worker node as a provider does: no goodbye."""
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)
