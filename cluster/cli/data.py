"""Look at prepared data: what is in it, samples as text, whether it is whole."""

import argparse

from cluster.cli import _data_ls, _data_show, _data_verify
from cluster.cli._actions import add_actions

_ACTIONS = {"ls": _data_ls, "show": _data_show, "verify": _data_verify}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take an action and what it takes."""
    add_actions(parser, _ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    return args.act(args)
