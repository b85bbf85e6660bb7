"""Look at checkpoints, and exchange models with Hugging Face."""

import argparse

from cluster.cli import _checkpoint_export, _checkpoint_import, _checkpoint_ls, _checkpoint_verify
from cluster.cli._actions import add_actions

_ACTIONS = {
    "ls": _checkpoint_ls,
    "verify": _checkpoint_verify,
    "export": _checkpoint_export,
    "import": _checkpoint_import,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take an action and what it takes."""
    add_actions(parser, _ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    return args.act(args)
