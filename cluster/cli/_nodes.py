"""What `nodes head` and `nodes join` share."""

import argparse
import os
from collections.abc import Sequence

_GRACE_S = 30.0
"""What Ray, and most init systems, take for granted."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Declare the options of both."""
    parser.add_argument(
        "--ip", metavar="ADDR", default="", help="by which the other nodes reach this one (default: the one on the way)"
    )
    parser.add_argument("--public", action="store_true", help="allow public addresses; a firewall must guard them")
    parser.add_argument(
        "--grace-s",
        metavar="S",
        type=float,
        help="what the machine grants from SIGTERM to its end (default: SOLVENT_GRACE_S, else 30)",
    )
    parser.add_argument("--provider", metavar="NAME", default="", help="whose machine (default: what doctor finds)")
    parser.add_argument("--zone", metavar="NAME", default="", help="where it stands, for its label")
    parser.add_argument(
        "--offer", metavar="NAME", default="", help="its line in cost.price_file (default: PROVIDER-MARKET-GPU)"
    )
    parser.add_argument(
        "--ray-arg", metavar="ARG", action="append", default=[], help="added to ray start, as --ray-arg=--x=1"
    )


def hold_node(args: argparse.Namespace, command: Sequence[str], *, ip: str, head: tuple[str, int] | None) -> int:
    """Hold the node until a signal."""
    from cluster.runtime.ray.ray_node import NodePlan, hold
    from cluster.runtime.ray.ray_start import build_env, check_private
    from elastic.errors import ConfigError

    if not args.public:
        check_private("--ip", ip)
    said = os.environ.get("SOLVENT_GRACE_S", "")
    try:
        grace_s = args.grace_s or float(said or _GRACE_S)
    except ValueError:
        raise ConfigError(f"SOLVENT_GRACE_S={said} is no number of seconds. Set it to one, or say --grace-s.") from None
    if not 3 <= grace_s <= 3600:
        raise ConfigError(
            f"--grace-s={grace_s:g} must be between 3 and 3600 s: less leaves no time to drain, more is for nobody's "
            "machine. Say what the provider grants after SIGTERM."
        )
    plan = NodePlan(command=command, env=build_env(os.environ, grace_s=grace_s), head=head, grace_s=grace_s)
    return hold(plan, say=lambda text: print(text, flush=True))
