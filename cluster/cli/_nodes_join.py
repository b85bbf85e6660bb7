"""Join this machine to a head, train there, and leave cleanly when the machine is taken away.

The run puts a watch on this node, which reads what the provider says about the machine's end. SIGTERM (or Ctrl-C) to
this command is a notice, too: the node drains with the time that the machine grants (--grace-s), the run goes on
without it, and the command returns 0 once nothing is needed here any more. If the head is lost, the node joins the next
one at the same address. It needs the head's token: RAY_AUTH_TOKEN, or a copy of its ~/.ray/auth_token.
"""

import argparse
import os

from cluster.cli._nodes import add_common, hold_node
from elastic.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the head and what this machine offers."""
    parser.add_argument("--head", metavar="ADDR", required=True, help="HOST or HOST:PORT of the head (port 6379)")
    parser.add_argument("--market", choices=["spot", "on-demand"], default="spot", help="how it was rented")
    parser.add_argument("--cpus", metavar="N", type=int, help="for trainers (default: all)")
    parser.add_argument("--gpus", metavar="N", type=int, help="for trainers (default: all)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Hold it until a signal."""
    from cluster.runtime.ray.ray_start import build_labels, check_private, find_own_ip, parse_head, plan_worker
    from cluster.runtime.ray.ray_token import MODE, TOKEN, get_default_path, read_token

    head = parse_head(args.head)
    if not args.public:
        check_private("--head", head[0])
    if not read_token(os.environ) and os.environ.get(MODE, "token").lower() == "token":
        raise ConfigError(
            f"there is no token here, and the head lets nobody in without. Copy the head's "
            f"{get_default_path(os.environ)} to the same place here, or set {TOKEN}."
        )
    ip = args.ip or find_own_ip(head)
    labels = build_labels(
        provider=args.provider or find_provider(), market=args.market, zone=args.zone, offer=args.offer
    )
    command = plan_worker(head=head, ip=ip, cpus=args.cpus, gpus=args.gpus, labels=labels, ray_args=args.ray_arg)
    return hold_node(args, command, ip=ip, head=head)


def find_provider() -> str:
    """Return whose machine this is, as far as files and environment tell; a pod is on somebody's machine."""
    from cluster.providers import ALWAYS, detect_all
    from cluster.runtime.this_machine import build_machine

    found = detect_all(build_machine("", grace_s=0.0))
    here = [name for name, evidence in found.items() if evidence.is_here and name != ALWAYS]
    return next(iter(sorted(here, key=lambda name: name == "kubernetes")), "")
