"""Plan a run before it is rented: memory, hours, dollars and risk of each offer, and the choice.

CONFIG is a YAML file; key=value overrides its keys. It may also be a run in progress, by its directory, URL or name
below runs/: what is left of it is then planned by what it has measured. Exit code 4: nothing keeps to the limits, and
the message says the smallest changes that would.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._numbers import count
from cluster.cli._planning import add_limits, describe, get_known, make_choice
from cluster.cli._runs import RUNS, add_json, open_rows, print_json
from elastic.config import RunConfig
from elastic.storage import is_url

if TYPE_CHECKING:
    from cluster.planner.candidates import Known
    from cluster.planner.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration or a run, limits and offers."""
    parser.add_argument("config", metavar="CONFIG|RUN")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    add_limits(parser)
    parser.add_argument("--top", type=count, default=8, help="how many offers to show")
    parser.add_argument("--memory", action="store_true", help="also of all strategies and micro-batches")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or raise that there is none (exit code 4)."""
    config, known, progress = _load(args)
    if config.device == "cpu":
        print("device=cpu: of CPUs we know no speed and no price; planned as if on GPUs", file=sys.stderr)
    used_h = (time.time() - progress.began_s) / 3600 if progress and progress.began_s else 0.0
    catalog, choice = make_choice(config, args, known, used_h=used_h, used_usd=progress.usd if progress else 0.0)
    sizes = _list_memory(config, choice.chosen) if args.memory or args.json else []
    rest = _extrapolate(config, progress) if progress else None
    if args.json:
        flops = config.flops_per_token * config.total_tokens
        chosen = choice.chosen
        print_json(
            {
                "flops_total": flops,
                "flops_6nd": 6.0 * config.model.num_params * config.total_tokens,
                "tokens": config.total_tokens,
                "tokens_done": known.tokens_done,
                "offers": [candidate.to_row() for candidate in choice.candidates],
                "chosen": chosen.to_row(),
                "why": choice.why,
                "changes": [
                    {"change": c.change, "usd_saved": c.usd_saved, "hours_saved": c.hours_saved, **c.candidate.to_row()}
                    for c in choice.changes
                ],
                "memory": sizes,
                "as_now": rest,
                "prices_as_of": str(catalog.as_of),
            }
        )
        return 0
    for line in _describe_work(config, known.tokens_done):
        print(line)
    if rest:
        print(f"as it goes now: {rest['hours']:,.1f} h and {rest['usd']:,.2f} USD more")
    for line in describe(choice, catalog, top=args.top):
        print(line)
    for row in sizes if args.memory else []:
        fits = "fits" if row["fits"] else "does not"
        print(f"  {row['gib']:7.1f} GiB {fits:8} strategy={row['strategy']} train.micro_batch={row['micro_batch']}")
    return 0


def _describe_work(config: RunConfig, tokens_done: int) -> tuple[str, str]:
    flops = config.flops_per_token * config.total_tokens
    six = 6.0 * config.model.num_params * config.total_tokens
    done = f"; {_show_count(tokens_done)} tokens are done" if tokens_done else ""
    return (
        f"{_show_count(config.model.num_params)} parameters, {_show_count(config.total_tokens)} tokens{done}",
        f"{flops:.2e} FLOP with attention, {six:.2e} by 6 N D",
    )


def _show_count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def _load(args: argparse.Namespace) -> "tuple[RunConfig, Known, Progress | None]":
    """Return the configuration, and what is known: of GPUs from before, of a run in progress from itself."""
    from elastic.config_load import load

    known = get_known()
    if not _is_run(args.config):
        config = load(args.config, args.overrides)
        if not _names_model(args.config, args.overrides):
            said = f"{args.config} has no model section, as one that `solvent checkpoint import` fills"
            print(f"{said}: planned for the model that is taken otherwise", file=sys.stderr)
        return config, known, None
    from cluster.ledger import read_ledger
    from cluster.planner.progress import learn, measure_progress
    from elastic.records.rundir import read_rows

    with open_rows(args.config) as run_dir:
        config = load(run_dir.config, args.overrides)
        progress = measure_progress(
            config,
            read_rows(run_dir.metrics),
            list(read_rows(run_dir.attempts)),
            read_ledger(read_rows(run_dir.ledger)),
        )
    return config, learn(config, progress, known), progress


def _names_model(path: str, overrides: list[str]) -> bool:
    import yaml

    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # it was loaded a moment ago
    return "model" in (content or {}) or any(override.startswith("model.") for override in overrides)


def _is_run(name: str) -> bool:
    return is_url(name) or Path(name).is_dir() or (not Path(name).exists() and (RUNS / name).is_dir())


def _extrapolate(config: RunConfig, progress: "Progress") -> dict[str, float] | None:
    from cluster.planner.progress import extrapolate

    rest = extrapolate(config, progress)
    return {"hours": rest.hours, "usd": rest.usd} if rest else None


def _list_memory(config: RunConfig, chosen: Any) -> list[dict[str, Any]]:
    """Return what every strategy and micro-batch would hold of the chosen GPUs."""
    from dataclasses import replace

    from cluster.planner.memory import estimate_memory
    from elastic import plugins
    from elastic.errors import ConfigError

    rows: list[dict[str, Any]] = []
    for strategy in plugins.get_names("elastic.strategies"):
        for micro_batch in (1, 2, 4, 8, 16, 32):
            try:
                other = replace(
                    config, strategy=strategy, shard_size=0, train=replace(config.train, micro_batch=micro_batch)
                )
            except ConfigError:  # single on several
                continue
            memory = estimate_memory(other, world_size=chosen.gpus, gpus_per_node=chosen.offer.gpus)
            fits = memory.peak_gib <= chosen.gpu.usable_gib
            gib = round(memory.peak_gib, 2)
            rows.append({"strategy": strategy, "micro_batch": micro_batch, "gib": gib, "fits": fits})
    return rows
