"""Train on a local Ray cluster while faults strike, and show that nothing is lost or repeated.

Faults come from a file (--faults), or from a recorded fleet of spot nodes (--trace), replayed faster; the run then ends
with the trace, resumable. It ends with 0 only if the run finished, every fault struck, and every applied step had
exactly its samples.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from cluster.cli._runs import add_json, print_json, text_on_stderr
from cluster.cli.train import check_before_paying, check_is_path, get_run_dir
from elastic.config import RunConfig
from elastic.errors import ConfigError, StorageError
from elastic.rundir import read_rows

if TYPE_CHECKING:
    from cluster.chaos.driver_process import DriverProcess
    from cluster.chaos.faults import Fault
    from cluster.chaos.injector import Injector
    from cluster.runtime.local_cluster import LocalCluster

_ENDS = {0: "yes", 3: "no: interrupted, resumable"}
_LOOK_EVERY_S = 0.05
_LOOK_CLOSELY_EVERY_S = 0.005
"""While the next fault waits for a save or a start, which may take some tens of milliseconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration and what shall go wrong."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--faults", metavar="FILE", type=Path, help="YAML list of faults: {at_step: 40, fault: kill}")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="CSV of a fleet: t_s,nodes or t_s,event,node")
    parser.add_argument(
        "--time-scale", metavar="X", type=float, default=60.0, help="seconds of the trace per second (%(default)g)"
    )
    parser.add_argument(
        "--notice-s", metavar="S", type=float, default=0.0, help="warning before each loss of the trace (%(default)g)"
    )
    parser.add_argument(
        "--steps-after", metavar="N", type=int, help="end N steps after the last fault, resumable (train to the end)"
    )
    parser.add_argument("--nodes", metavar="N", type=int, help="nodes at the start, of one worker each (max_workers)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="draws random targets (%(default)s)")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, let it happen, and tell what it came to."""
    from cluster.chaos.faults import load_faults
    from cluster.chaos.result import build_result
    from cluster.chaos.trace import load_trace, plan_trace
    from elastic.config_load import load_here

    overrides = [*args.overrides, "data.record_samples=true"]
    config = load_here(args.config, overrides)
    _check_arguments(args)
    num_nodes = args.nodes or config.cluster.max_workers
    faults: list[Fault] = []
    end_s = float("inf")
    if args.trace:
        plan = plan_trace(
            load_trace(args.trace),
            num_nodes=num_nodes,
            time_scale=args.time_scale,
            notice_s=args.notice_s,
            seed=args.seed,
        )
        num_nodes, faults, end_s = plan.initial_nodes, plan.faults, plan.end_s
    if args.faults:
        faults += load_faults(
            args.faults,
            num_steps=config.train.steps,
            num_nodes=num_nodes,
            max_workers=config.cluster.max_workers,
            seed=args.seed,
        )
    check_is_path(
        config.storage, why="chaos watches saves and counts samples in the run's own files, as they are written"
    )
    check_before_paying(config)
    _check_new(config)
    out = sys.stderr if args.json else sys.stdout
    arguments = [args.config, *overrides, *_get_paths(config)]
    with text_on_stderr() if args.json else nullcontext():
        exit_code, injector = _train(
            config,
            faults,
            arguments=arguments,
            num_nodes=num_nodes,
            end=_End(end_s=end_s, steps_after=args.steps_after),
            out=out,
        )
    result = build_result(config, injector.struck, missed=injector.missed, exit_code=exit_code)
    if args.json:
        print_json(result)
    else:
        _print_result(result)
    if result["samples_lost"] or result["samples_repeated"]:
        return 1
    return exit_code or (1 if injector.missed else 0)


def _get_paths(config: RunConfig) -> list[str]:
    """Return the paths as overrides: the driver reads the same file, but need not find the same there."""
    return [f"storage={config.storage}", f"data.path={config.data.path}", f"cost.price_file={config.cost.price_file}"]


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot.

    Raises:
        ConfigError: it cannot work.
    """
    if not args.faults and not args.trace:
        raise ConfigError("neither --faults nor --trace is given, so nothing would go wrong. Give a file of faults.")
    if args.nodes is not None and args.nodes < 1:
        raise ConfigError(f"--nodes {args.nodes} leaves nobody to train. Give 1 or more.")
    if args.steps_after is not None and args.steps_after < 1:
        raise ConfigError(f"--steps-after {args.steps_after} ends the run before the last fault shows. Give 1 or more.")
    if not 0 < args.time_scale < float("inf"):
        raise ConfigError(f"--time-scale {args.time_scale} must be above 0: it divides the trace's seconds. Try 60.")
    if not 0 <= args.notice_s < float("inf"):
        raise ConfigError(f"--notice-s {args.notice_s} must be 0 or more seconds.")


def _check_new(config: RunConfig) -> None:
    """Refuse to strike a run that exists: its earlier samples may not be recorded, and it may be dear to somebody.

    Raises:
        StorageError: it exists.
    """
    run_dir = get_run_dir(config)
    if any(read_rows(run_dir.metrics)):
        raise StorageError(
            f"run={config.run!r} has trained before ({run_dir.root}), but chaos must see every sample from the first "
            f"step on. Give it a name of its own (run={config.run}-chaos), or remove the directory."
        )


# ---- while it runs


@dataclass(frozen=True, kw_only=True)
class _End:
    """When a run is interrupted though its last step is not done."""

    end_s: float
    """Seconds after the first step."""
    steps_after: int | None
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


def _train(
    config: RunConfig,
    faults: Sequence["Fault"],
    *,
    arguments: Sequence[str],
    num_nodes: int,
    end: _End,
    out: IO[str],
) -> tuple[int, "Injector"]:
    """Train on a cluster of our own while faults strike; return the driver's exit code and what was done to it."""
    from cluster.chaos.driver_process import DriverProcess
    from cluster.chaos.injector import Injector
    from cluster.chaos.schedule import Schedule
    from cluster.runtime import adapter
    from cluster.runtime.local_cluster import LocalCluster
    from elastic.storage.faults import FAULTS_VARIABLE

    least_nodes = config.get_world_sizes()[0]
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", file=out, flush=True)

    with tempfile.TemporaryDirectory(prefix="solvent-chaos-") as folder:
        control = Path(folder) / "storage.json"
        os.environ[FAULTS_VARIABLE] = str(control)  # Ray's daemons hand it on to hosts, and they to trainers
        say(f"starting a Ray cluster of {num_nodes} node(s) on this machine")
        with LocalCluster(num_nodes=num_nodes, cpus_per_node=config.cluster.cpus_per_worker) as cluster:
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
    end: _End,
    say: Callable[[str], None],
) -> int:
    """Watch the run and let faults strike until its driver ends; return the driver's exit code."""
    from cluster.runtime.driver import look

    is_stopping = False
    while (exit_code := driver.poll()) is None:
        try:
            if scene := look(config):
                injector.watch(scene, is_saving=_is_saving(config))
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


def _is_saving(config: RunConfig) -> bool:
    """Tell whether a checkpoint has begun to appear and is not committed; an older one may be about to be removed."""
    newest = max(get_run_dir(config).checkpoints.glob("step-*"), default=None)
    return newest is not None and not (newest / "COMMITTED").exists()


def _spoil_storage(control: Path, fault: "Fault", until_s: float) -> None:
    """Tell every process of the run, through the control file they look at."""
    from elastic.storage import faults

    kind = cast(faults.Kind, fault.fault.removeprefix("storage_"))
    faults.write_fault(control, faults.Fault(kind=kind, rate=fault.rate, until_s=until_s, seed=fault.seed))


# ---- what it came to


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="what went wrong, and what it cost")
    for column in ("incident", "node", "world", "at step", "outage", "steps redone"):
        table.add_column(column)
    for incident in result["incidents"]:
        table.add_row(
            incident["kind"],
            (incident["node"] or "-")[:8],
            incident["world"],
            str(incident["step"]),
            f"{incident['outage_s']:.2f} s",
            str(incident["lost_steps"]),
        )
    console.print(table)
    lines = [
        ("run", result["run"]),
        ("finished", _ENDS.get(result["exit_code"], f"no, exit code {result['exit_code']}")),
        ("last step", f"{result['final_step']}, loss {_show(result['final_loss'], '.4f')}"),
        ("samples", f"{result['samples_lost']} lost, {result['samples_repeated']} repeated"),
        ("worlds", " -> ".join(map(str, result["worlds"]))),
        ("faults", f"{len(result['faults'])} struck"),
        *[("missed", fault) for fault in result["faults_missed"]],
    ]
    if goodput := result["goodput"]:
        paid, time = goodput["paid"], f"{goodput['measured']:.1%} of the time made progress that lasts"
        text = f"{time}, where Young's formula says {goodput['predicted']:.1%}; {_show(paid, '.1%')} of the paid time"
        lines.append(("goodput", text))
    for name, text in lines:
        console.print(f"{name:10} {text}", soft_wrap=True, highlight=False)


def _show(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)
