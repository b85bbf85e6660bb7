"""Hold rented machines together as a Ray cluster: a head, and nodes that join it and leave cleanly."""

import argparse

from cluster.cli import _nodes_head, _nodes_join

_ACTIONS = {"head": _nodes_head, "join": _nodes_join}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take an action and what it takes."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action in _ACTIONS.items():
        summary = (action.__doc__ or "").partition("\n")[0]
        sub = actions.add_parser(name, help=summary, description=action.__doc__)
        action.add_arguments(sub)
        sub.set_defaults(act=action.run)


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    return args.act(args)
