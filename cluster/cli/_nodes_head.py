"""Start and hold the head of a cluster on this machine, which should stay: rent it on demand.

It runs drivers and the coordinator and trains nothing. The dashboard, where runs are submitted, listens on the
loop-back interface only: reach it by a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD). Nodes join with the head's token; one
is made in ~/.ray/auth_token if there is none. SIGTERM or Ctrl-C end the head, and the cluster with it.
"""

import argparse
import os

from cluster.cli._nodes import add_common, hold_node


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take where it listens."""
    parser.add_argument("--port", metavar="N", type=int, default=6379, help="where nodes join (default: 6379)")
    parser.add_argument("--dashboard-port", metavar="N", type=int, default=8265, help="on 127.0.0.1 (default: 8265)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Hold it until a signal."""
    from cluster.runtime.ray.ray_start import build_labels, find_own_ip, plan_head
    from cluster.runtime.ray.ray_token import MODE, get_default_path, make_token, read_token

    if not read_token(os.environ) and os.environ.get(MODE, "token").lower() == "token":
        path = get_default_path(os.environ)
        make_token(path)
        print(f"a new token is in {path}; copy the file to the machines that join or submit", flush=True)
    ip = args.ip or find_own_ip(None)
    labels = build_labels(provider=args.provider, market="on-demand", zone=args.zone, offer=args.offer)
    command = plan_head(ip=ip, port=args.port, dashboard_port=args.dashboard_port, labels=labels, ray_args=args.ray_arg)
    print(f"the head is {ip}:{args.port}; its dashboard is http://127.0.0.1:{args.dashboard_port}", flush=True)
    return hold_node(args, command, ip=ip, head=None)
