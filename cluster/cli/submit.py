"""Start a run on a cluster elsewhere, follow it to its end, and return its exit code.

CONFIG is a YAML file; key=value overrides its keys. `--to kuberay` renders a RayJob (see `solvent render`), applies it
through your kubeconfig, and shows its log. The same command finds a job that runs, and resumes one that has ended.
"""

import argparse
import os
import sys

from cluster.cli._runs import add_json, print_json
from cluster.cli.render import add_placement, render_for
from elastic.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration, a target, and what to do there."""
    add_placement(parser)
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what runs there")
    parser.add_argument("--profile", metavar="P", default="generic", help="the cloud, as for render (default: generic)")
    parser.add_argument("--context", default="", help="of the kubeconfig; else the current one")
    parser.add_argument("--take-over", action="store_true", help="overwrite fields that somebody else has set")
    parser.add_argument("--detach", action="store_true", help="do not follow; the same command does so later")
    parser.add_argument("--delete", action="store_true", help="end the run there, and delete what was applied")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Submit and follow; return the run's own exit code."""
    return TARGETS[args.to](args)


def submit_to_kuberay(args: argparse.Namespace) -> int:
    """Apply the rendered stream, or delete what it names."""
    from cluster.kube import submit
    from cluster.kube.render import is_kubernetes
    from cluster.kube.server import connect

    documents = render_for(args, args.profile)
    if not is_kubernetes(documents):
        raise ConfigError(f"--profile {args.profile} is not for KubeRay. Take generic, gke-spot, eks-spot or aks-spot.")
    namespace = documents[-1]["metadata"]["namespace"]
    server = connect(namespace, kubeconfig=os.environ.get("KUBECONFIG", ""), context=args.context)
    if args.delete:
        submit.delete(server, documents, say=_say)
        return 0
    name = submit.submit(server, documents, on_conflict="take" if args.take_over else "refuse", say=_say)
    result = {"job": name, "namespace": namespace}
    if args.detach:
        if args.json:
            print_json(result)
        return 0
    try:
        ending = submit.follow(server, name, say=_say, show=_say if args.json else print)
    except KeyboardInterrupt:
        _say(f"{name} goes on without being watched; the same command follows it again, with --delete it ends")
        raise
    if args.json:
        print_json({**result, "end": ending.kind, "reason": ending.reason, "attempts": ending.attempts})
    if ending.kind != "finished":
        _say(f"{name} {ending.kind}: {ending.reason}")
    return ending.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


TARGETS = {"kuberay": submit_to_kuberay}
