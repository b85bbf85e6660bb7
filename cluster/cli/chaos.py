"""Train on a local Ray cluster while faults strike, and show that nothing is lost or repeated.

Faults come from a file (--faults), or from a recorded fleet of spot nodes (--trace), replayed faster; the run then ends
with the trace, resumable. It ends with 0 only if the run finished, every fault struck, and every applied step had
exactly its samples. What it prints with --json is kept as chaos.json beside the run's rows. With --predict-from the
goodput is told before the run begins (prediction.json), from what an earlier such run took to lose and get nodes.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._runs import add_json, open_rows, print_json, text_on_stderr
from cluster.cli._struck import End, train_struck
from cluster.cli.train import check_before_paying, check_is_path, get_run_dir
from elastic.config import RunConfig
from elastic.errors import ConfigError, StorageError
from elastic.mixture import get_paths
from elastic.records.rundir import format_utc, read_rows
from elastic.strict_json import dump_json

if TYPE_CHECKING:
    from cluster.chaos.faults import Fault

_RESULT, _PREDICTION = "chaos.json", "prediction.json"
"""In the run's directory."""
_ENDS = {0: "yes", 3: "no: interrupted, resumable"}


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
    parser.add_argument("--predict-from", metavar="RUN", help="a run of `chaos` that lost nodes and got new ones")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, let it happen, and tell what it came to."""
    from cluster.chaos.faults import load_faults
    from cluster.chaos.result import build_result
    from cluster.chaos.trace import plan_trace
    from cluster.traces import load_trace
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
    prediction = _predict(config, faults, num_nodes=num_nodes, end_s=end_s, earlier=args.predict_from)
    out = sys.stderr if args.json else sys.stdout
    arguments = [args.config, *overrides, *_get_paths(config)]
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", file=out, flush=True)

    if prediction:
        say(
            f"predicted, before it begins: {prediction['measured']:.1%} of the time makes progress that lasts, "
            f"{prediction['paid']:.1%} of the paid time"
        )
    with text_on_stderr() if args.json else nullcontext():
        say(f"starting a Ray cluster of {num_nodes} node(s) on this machine")
        exit_code, injector = train_struck(
            config,
            faults,
            arguments=arguments,
            num_nodes=num_nodes,
            end=End(end_s=end_s, steps_after=args.steps_after),
            out=out,
            say=say,
        )
    result = build_result(config, injector.struck, missed=injector.missed, exit_code=exit_code)
    result["prediction"] = prediction
    _keep(config, _RESULT, result)
    if args.json:
        print_json(result)
    else:
        _print_result(result)
    if result["samples_lost"] or result["samples_repeated"]:
        return 1
    return exit_code or (1 if injector.missed else 0)


def _predict(
    config: RunConfig, faults: "list[Fault]", *, num_nodes: int, end_s: float, earlier: str | None
) -> dict[str, Any] | None:
    """Return what the run will come to, and write it down; None if no earlier run is given to tell it from.

    Raises:
        ConfigError: the end of the run is not known beforehand, or the earlier run was no run of `chaos`.
        DataError: that one has not seen what the prediction needs.
    """
    if not earlier:
        return None
    from cluster.cli._prediction import measure_boot_s, predict
    from cluster.ledger import read_ledger
    from cluster.simulator.measured import measure

    if end_s == float("inf") or any(fault.at_s is None or fault.fault not in ("add", "remove") for fault in faults):
        raise ConfigError("--predict-from needs a --trace without --notice-s, and no --faults. Leave one of them out.")
    with open_rows(earlier) as rows:
        try:
            told = json.loads((rows.root / _RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--predict-from {earlier} has no {_RESULT} ({error}). Give a run that `solvent chaos` has ended."
            ) from error
        measured = measure(list(read_rows(rows.metrics)), read_rows(rows.attempts), read_ledger(read_rows(rows.ledger)))
    boot_s = measure_boot_s(told["faults"])
    found = predict(config, faults, num_nodes=num_nodes, end_s=end_s, measured=measured, boot_s=boot_s)
    prediction = {
        **asdict(found),
        "from": earlier,
        "at_utc": format_utc(time.time()),
        "measured_before": {**asdict(measured), "boot_s": boot_s},
    }
    _keep(config, _PREDICTION, prediction)
    return prediction


def _keep(config: RunConfig, name: str, content: dict[str, Any]) -> None:
    root = get_run_dir(config).root
    root.mkdir(parents=True, exist_ok=True)  # a driver that ended at once may have made none
    (root / name).write_text(dump_json(content), encoding="utf-8")


def _get_paths(config: RunConfig) -> list[str]:
    """Return the paths as overrides: the driver reads the same file, but need not find the same there."""
    data = [f"{key}={path}" for key, path in get_paths(config.data).items()]
    return [f"storage={config.storage}", *data, f"cost.price_file={config.cost.price_file}"]


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
        if said := result["prediction"]:
            lines.append(("predicted", f"{said['measured']:.1%} of the time, {said['paid']:.1%} of the paid time"))
    for name, text in lines:
        console.print(f"{name:10} {text}", soft_wrap=True, highlight=False)


def _show(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)
