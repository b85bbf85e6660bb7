"""Do the main job here: train on real text while nodes are lost, killed and added.

The text is the King James Bible, the tokenizer our own; a Ray cluster of three nodes is started on this machine. One
node is drained with notice, one is added in its place, one trainer is killed -9. It ends with a summary and a report;
with exit code 1 and the reason if one of the three has not come about, as on a machine that is too busy.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.train import check_before_paying, check_is_path, get_run_dir
from elastic.config import RunConfig
from elastic.paths import resolve_path
from elastic.records.rundir import read_rows

if TYPE_CHECKING:
    from cluster.chaos.injector import Injector

NUM_NODES = 3
_INCIDENTS = {
    "drain": ("node_drained", "a node that leaves with notice"),
    "add": ("node_added", "a node that joins"),
    "kill": ("trainer_lost", "a trainer that is killed"),
}
"""What the demo promises: the fault, the kind of its incident, and how we call it."""
_CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take where to write."""
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="the run's directory (default %(default)s)")
    parser.add_argument("overrides", metavar="key=value", nargs="*")


def run(args: argparse.Namespace) -> int:
    """Prepare, train through three incidents, and tell what happened."""
    from elastic.config_load import load_here

    why = "the demo trains on this machine, and its summary and report are made from files here"
    check_is_path(args.out, key="--out", why=why)
    out = Path(resolve_path(args.out))
    data = out.with_name(out.name + "-data")
    where = [f"storage={out.parent}", f"run={out.name}", f"data.path={data}"]
    arguments = [*where, *args.overrides]
    config = load_here(_CONFIG, arguments)
    check_is_path(config.storage, why=why)
    _prepare(data)
    _move_aside(out)
    check_before_paying(config)
    exit_code, injector = _train(config, [str(_CONFIG), *arguments])
    _print_summary(config)
    if exit_code:
        return exit_code
    missing = find_missing(injector, list(read_rows(get_run_dir(config).incidents)))
    for line in missing:
        print(f"solvent: the demo shows less than it promises: {line}", file=sys.stderr)
    return int(bool(missing))


def _prepare(data: Path) -> None:
    from elastic.data.preparation.prepare import prepare
    from elastic.data.prepared.shards import open_dataset

    if (data / "dataset.json").exists():
        info = open_dataset(data).info
        print(f"data: {data}, prepared before")
    else:
        info = prepare(["kjv:"], data)
        print(f"data: the King James Bible, cut with our own tokenizer into {data}")
    print(f"      {info.train.num_tokens:,} tokens to train on, {info.val.num_tokens:,} held out")


def _move_aside(out: Path) -> None:
    """Keep an earlier demo: nothing that was saved is harmed."""
    if out.exists():
        number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))


def find_missing(injector: "Injector", incidents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what of the three incidents has not come about, and why, a line each."""
    kinds = [incident["kind"] for incident in incidents]
    if any(_has_grown(incident) for incident in incidents):  # the change for a loss takes along who waits to join
        kinds.append("node_added")
    struck = {happened.fault.partition(" ")[0]: happened for happened in injector.struck}
    lines: list[str] = []
    for fault, (kind, what) in _INCIDENTS.items():
        if kind in kinds:
            continue
        if fault in struck:
            happened = struck[fault]
            why = f"at step {happened.step} ({happened.what}), but the run ended before its world had changed for it"
        else:
            why = "not begun before the run ended"
        lines.append(
            f"{what}: {why}. This machine is too busy, or train.steps are too few. End what else runs here, or raise "
            "train.steps, and start the demo again."
        )
    return lines


def _has_grown(incident: Mapping[str, Any]) -> bool:
    before, _, after = incident.get("world", "").partition(" -> ")
    return bool(after) and int(after) > int(before)


def _train(config: RunConfig, arguments: Sequence[str]) -> "tuple[int, Injector]":
    from cluster.chaos.faults import Fault, Target
    from cluster.cli._struck import End, train_struck

    steps = config.train.steps
    last, first = Target(by="rank", index=NUM_NODES - 1), Target(by="rank", index=0)
    faults = [
        Fault(at_step=steps // 4, fault="drain", target=last, notice_s=10, phase="training"),
        # as a fleet does, a new node is asked for at once; where everything shares two cores it takes a minute to join
        Fault(at_step=steps * 3 // 8, fault="add", phase="training"),
        Fault(at_step=steps // 2, fault="kill", target=first, phase="training"),
    ]
    print(f"starting a Ray cluster of {NUM_NODES} nodes on this machine", flush=True)
    say = partial(_say, config)
    return train_struck(
        config,
        faults,
        arguments=arguments,
        num_nodes=NUM_NODES,
        end=End(),
        out=sys.stdout,
        say=say,
        favour="joining",
    )


def _say(config: RunConfig, line: str) -> None:
    """Have the driver show a line, above its table and on its clock, if it has a coordinator to bring it."""
    from cluster.runtime.driver import get_coordinator_name
    from cluster.runtime.ray import adapter

    coordinator = adapter.get_coordinator(get_coordinator_name(config))
    if coordinator is None:
        print(line, flush=True)
    else:
        adapter.post(coordinator.relay, [line])


def _print_summary(config: RunConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from cluster.report.page import build_report
    from elastic.data.prepared.shards import open_dataset
    from elastic.records.attempts import final_rows

    run_dir = get_run_dir(config)
    console = Console()
    incidents = list(read_rows(run_dir.incidents))
    table = Table(title="what went wrong, and what it cost")
    for column in ("incident", "node", "world", "at step", "outage", "steps redone"):
        table.add_column(column)
    for incident in incidents:
        table.add_row(
            incident["kind"],
            (incident["node"] or "-")[:8],
            incident["world"],
            str(incident["step"]),
            f"{incident['outage_s']:.2f} s",
            str(incident["lost_steps"]),
        )
    console.print(table)
    rows = final_rows(read_rows(run_dir.metrics))
    info = open_dataset(config.data.path).info
    val_loss = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None)
    worlds = " -> ".join(str(attempt["world_size"]) for attempt in read_rows(run_dir.attempts))
    usd = sum(row["usd"] for row in read_rows(run_dir.ledger))
    for name, text in (
        ("worlds", worlds),
        ("steps", f"{len(rows)} of {config.train.steps}"),
        ("validation loss", "-" if val_loss is None else f"{val_loss:.3f} nats per token"),
        ("unigram entropy", f"{info.val_cross_entropy_nats:.3f} nats per token: guessing by frequency alone"),
        ("spent", f"{usd:.4f} USD at {config.cost.usd_per_gpu_hour:g} USD per worker-hour"),
        ("report", build_report(run_dir)),
    ):
        console.print(f"{name:16} {text}", soft_wrap=True, highlight=False)
