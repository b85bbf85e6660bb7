"""Do the main job here: train on real text while nodes are lost, killed and added.

The text is the King James Bible, the tokenizer our own; a Ray cluster of three nodes is started on this machine. One
node is drained with notice, one trainer is killed -9, one node is added. It ends with a summary and a report.
"""

import argparse
from functools import partial
from pathlib import Path

from cluster.cli.train import check_before_paying, check_is_path, get_run_dir, open_sinks
from elastic.config import RunConfig
from elastic.paths import resolve_path
from elastic.rundir import read_rows

NUM_NODES = 3
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
    config = load_here(_CONFIG, [*where, *args.overrides])
    check_is_path(config.storage, why=why)
    _prepare(data)
    _move_aside(out)
    check_before_paying(config)
    exit_code = _train(config)
    _print_summary(config)
    return exit_code


def _prepare(data: Path) -> None:
    from elastic.data.prepare import prepare
    from elastic.data.shards import open_dataset

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


def _train(config: RunConfig) -> int:
    from cluster.chaos.faults import Fault, Target
    from cluster.chaos.injector import Injector
    from cluster.chaos.schedule import Schedule
    from cluster.runtime.adapter import drain_node
    from cluster.runtime.driver import look, train
    from cluster.runtime.local_cluster import LocalCluster
    from cluster.runtime.published import Update
    from cluster.runtime.view import View

    steps = config.train.steps
    last, first = Target(by="rank", index=NUM_NODES - 1), Target(by="rank", index=0)
    faults = [
        Fault(at_step=steps // 4, fault="drain", target=last, notice_s=10, phase="training"),
        Fault(at_step=steps // 2, fault="kill", target=first, phase="training"),
        Fault(at_step=steps * 5 // 8, fault="add", phase="training"),
    ]
    with View(config, partial(open_sinks, config, get_run_dir(config))) as view:
        view.say(f"starting a Ray cluster of {NUM_NODES} nodes on this machine")
        with LocalCluster(num_nodes=NUM_NODES) as cluster:
            injector = Injector(
                Schedule(faults),
                cluster,
                drain=lambda node, deadline_s: drain_node(node, reason="spot", deadline_s=deadline_s),
                say=view.say,
            )

            def on_update(update: Update) -> None:
                view.update(update)
                if scene := look(config):
                    injector.watch(scene)

            ending = train(config, address=cluster.address, on_update=on_update)
            injector.close()
        view.end(ending)
    return ending.exit_code


def _print_summary(config: RunConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from cluster.report.page import build_report
    from elastic.attempts import final_rows
    from elastic.data.shards import open_dataset

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
    val_loss = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), float("nan"))
    worlds = " -> ".join(str(attempt["world_size"]) for attempt in read_rows(run_dir.attempts))
    usd = sum(row["usd"] for row in read_rows(run_dir.ledger))
    for name, text in (
        ("worlds", worlds),
        ("steps", f"{len(rows)} of {config.train.steps}"),
        ("validation loss", f"{val_loss:.3f} nats per token"),
        ("unigram entropy", f"{info.val_cross_entropy_nats:.3f} nats per token: guessing by frequency alone"),
        ("spent", f"{usd:.4f} USD at {config.cost.usd_per_gpu_hour:g} USD per worker-hour"),
        ("report", build_report(run_dir)),
    ):
        console.print(f"{name:16} {text}", soft_wrap=True, highlight=False)
