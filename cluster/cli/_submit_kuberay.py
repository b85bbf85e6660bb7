"""`solvent submit --to kuberay`: apply a RayJob and follow it."""

import argparse
import os
import sys
from functools import partial
from typing import Any

from cluster.cli._finished import find_finished_elsewhere
from cluster.cli._runs import print_json
from cluster.cli.render import render_for
from elastic.errors import ConfigError

OPTIONS = {
    "--profile": "profile",
    "--context": "context",
    "--take-over": "take_over",
    "--override": "override",
    "--set": "options",
}
_DEFAULT_PROFILE = "generic"


def add_arguments(parser: Any) -> None:
    """Take what only Kubernetes needs."""
    parser.add_argument("--profile", metavar="P", default="", help="the cloud, as for render (default: generic)")
    parser.add_argument("--context", default="", help="of the kubeconfig; else the current one")
    parser.add_argument("--take-over", action="store_true", help="overwrite fields that somebody else has set")


def run(args: argparse.Namespace) -> int:
    """Apply the rendered stream and follow it, or delete what it names."""
    from cluster.kube.api.apply import delete, submit
    from cluster.kube.api.follow import follow
    from cluster.kube.api.server import connect
    from cluster.kube.render import is_kubernetes
    from elastic.config_load import load

    profile = args.profile or _DEFAULT_PROFILE
    documents = render_for(args, profile)
    if not is_kubernetes(documents):
        raise ConfigError(f"--profile {profile} is not for KubeRay. Take generic, gke-spot, eks-spot or aks-spot.")
    namespace = documents[-1]["metadata"]["namespace"]
    server = connect(namespace, kubeconfig=os.environ.get("KUBECONFIG", ""), context=args.context)
    if args.delete:
        delete(server, documents, say=_say)
        return 0
    config = load(args.config, args.overrides)
    submitted = submit(
        server,
        documents,
        on_conflict="take" if args.take_over else "refuse",
        find_end=partial(find_finished_elsewhere, config, os.environ),
        say=_say,
    )
    result = {"job": submitted.job, "namespace": namespace}
    if args.detach or submitted.how == "finished":
        if args.json:
            print_json(result if args.detach else {**result, "end": "finished", "reason": "", "attempts": 0})
        return 0
    try:
        colors = "keep" if sys.stdout.isatty() and not args.json else "strip"
        ending = follow(server, submitted.job, say=_say, show=_say if args.json else _show, colors=colors)
    except KeyboardInterrupt:
        _say(f"{submitted.job} goes on without being watched; the same command follows it again, with --delete it ends")
        raise
    if args.json:
        print_json({**result, "end": ending.kind, "reason": ending.reason, "attempts": ending.attempts})
    if ending.kind != "finished":
        _say(f"{submitted.job} {ending.kind}: {ending.reason}")
    return ending.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(line: str) -> None:
    print(line, flush=True)
