"""Start a run on a cluster elsewhere, follow it to its end, and return its exit code.

CONFIG is a YAML file; key=value overrides its keys. `--to ray` sends the working directory and the configuration to a
Ray cluster's job API; `--to kuberay` renders a RayJob (see `solvent render`) and applies it through your kubeconfig.
The same command finds a job that runs, and resumes one that has ended before its run had finished. Ctrl-C stops
following; the run goes on.
"""

import argparse

from cluster.cli import _submit_kuberay, _submit_ray
from cluster.cli._planning import plan_first
from cluster.cli._runs import add_json
from cluster.cli.render import add_placement
from elastic.errors import ConfigError

TARGETS = {"ray": _submit_ray, "kuberay": _submit_kuberay}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration, a target, and what to do there."""
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what runs there")
    parser.add_argument("--detach", action="store_true", help="do not follow; the same command does so later")
    parser.add_argument(
        "--delete",
        action="store_true",
        help="end the run there (under Ray it saves first), and delete what was applied",
    )
    add_json(parser)
    add_placement(parser)
    for name, target in TARGETS.items():
        target.add_arguments(parser.add_argument_group(f"with --to {name}"))


def run(args: argparse.Namespace) -> int:
    """Submit and follow; return the run's own exit code."""
    from elastic.config_load import load

    for name, target in TARGETS.items():
        for option, field in target.OPTIONS.items() if name != args.to else ():
            if getattr(args, field):
                raise ConfigError(f"{option} is for --to {name}, and this is --to {args.to}. Leave it out.")
    if args.plan and not args.delete:
        plan_first(load(args.config, args.overrides), args)
    return TARGETS[args.to].run(args)
