"""Hold rented machines together as a Ray cluster: a head, and nodes that join it and leave cleanly."""

import argparse

from cluster.cli import _nodes_head, _nodes_join
from cluster.cli._actions import add_actions

_ACTIONS = {"head": _nodes_head, "join": _nodes_join}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take an action and what it takes."""
    add_actions(parser, _ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    return args.act(args)
