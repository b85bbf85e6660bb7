"""Train on a cluster of our own on this machine while faults strike: what `demo` and `chaos` have in common."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

from cluster.cli.train import get_run_dir
from elastic.config import RunConfig

if TYPE_CHECKING:
    from cluster.chaos.driver_process import DriverProcess
    from cluster.chaos.faults import Fault
    from cluster.chaos.injector import Injector
    from cluster.runtime.ray.local_cluster import LocalCluster

_LOOK_EVERY_S = 0.05
_LOOK_CLOSELY_EVERY_S = 0.005
"""While the next fault waits for a save or a start, which may take some tens of milliseconds."""


@dataclass(frozen=True, kw_only=True)
class End:
    """When a run is interrupted though its last step is not done."""

    end_s: float = float("inf")
    """Seconds after the first step."""
    steps_after: int | None = None
    """So many steps after the last fault."""

    def get_reason(self, injector: "Injector", *, step: int, too_few: bool) -> str:
        """Return why the run ends now; empty if it goes on."""
        if too_few and not injector.brings_nodes:
            return "no fault brings the nodes that training needs"
        if injector.elapsed_s > self.end_s:
            return "the trace is over"
        if self.steps_after is None or not injector.is_done or step < injector.struck[-1].step + self.steps_after:
            return ""
        return f"{self.steps_after} steps after the last fault"


def train_struck(
    config: RunConfig,
    faults: Sequence["Fault"],
    *,
    arguments: Sequence[str],
    num_nodes: int,
    end: End,
    out: IO[str],
    say: Callable[[str], None],
    favour: Literal["training", "joining"] = "training",
) -> tuple[int, "Injector"]:
    """Train while faults strike; return the driver's exit code and what was done to it.

    The driver is a process of its own: a node that starts on a busy machine holds this one up for a minute.

    Args:
        arguments: of `solvent train`.
        out: where the driver prints.
        say: tells of each fault; this process is connected to the cluster then.
        favour: as `LocalCluster` takes it.
    """
    from cluster.chaos.driver_process import DriverProcess
    from cluster.chaos.injector import Injector
    from cluster.chaos.strikes import Schedule
    from cluster.runtime.ray import adapter
    from cluster.runtime.ray.local_cluster import LocalCluster
    from elastic.storage.faulty import FAULTS_VARIABLE

    least_nodes = config.get_world_sizes()[0]
    with tempfile.TemporaryDirectory(prefix="solvent-chaos-") as folder:
        control = Path(folder) / "storage.json"
        os.environ[FAULTS_VARIABLE] = str(control)  # Ray's daemons hand it on to hosts, and they to trainers
        place = {"num_nodes": num_nodes, "cpus_per_node": config.cluster.cpus_per_worker}
        with LocalCluster(**place, favour=favour) as cluster:
            adapter.connect(cluster.address, config.cluster)
            driver = DriverProcess(arguments, output=out, env={"RAY_ADDRESS": cluster.address})
            injector = Injector(
                Schedule(faults),
                cluster,
                drain=lambda node, deadline_s: adapter.drain_node(node, reason="spot", deadline_s=deadline_s),
                terminate=adapter.drain_as_on_sigterm,
                least_nodes=least_nodes,
                restart_driver=driver.restart,
                spoil_storage=partial(_spoil_storage, control),
                say=say,
            )
            try:
                exit_code = _follow(config, driver, injector, cluster, end=end, say=say)
            finally:
                injector.close()
                driver.kill()
                adapter.disconnect()
        del os.environ[FAULTS_VARIABLE]
    return exit_code, injector


def _follow(
    config: RunConfig,
    driver: "DriverProcess",
    injector: "Injector",
    cluster: "LocalCluster",
    *,
    end: End,
    say: Callable[[str], None],
) -> int:
    """Watch the run and let faults strike until its driver ends; return the driver's exit code."""
    from cluster.runtime.driver import look

    is_stopping = False
    while (exit_code := driver.poll()) is None:
        try:
            if scene := look(config):
                injector.watch(scene, is_saving=is_saving(config))
            else:
                injector.act_due()
            too_few = len(cluster.nodes) < config.get_world_sizes()[0]
            reason = end.get_reason(injector, step=scene.step if scene else 0, too_few=too_few)
            if reason and not is_stopping:
                say(f"the run ends: {reason}")
                is_stopping = True
                driver.interrupt()
            time.sleep(_LOOK_CLOSELY_EVERY_S if scene and injector.is_near(scene) else _LOOK_EVERY_S)
        except KeyboardInterrupt:
            if is_stopping:
                raise
            is_stopping = True
            driver.interrupt()
    return exit_code


def is_saving(config: RunConfig) -> bool:
    """Tell whether a checkpoint has begun to appear and is not committed; an older one may be about to be removed."""
    newest = max(get_run_dir(config).checkpoints.glob("step-*"), default=None)
    return newest is not None and not (newest / "COMMITTED").exists()


def _spoil_storage(control: Path, fault: "Fault", until_s: float) -> None:
    """Tell every process of the run, through the control file they look at."""
    from elastic.storage import faulty as faults

    kind = cast(faults.Kind, fault.fault.removeprefix("storage_"))
    faults.write_fault(control, faults.Fault(kind=kind, rate=fault.rate, until_s=until_s, seed=fault.seed))
