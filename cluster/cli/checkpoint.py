"""Look at checkpoints, and exchange models with Hugging Face."""

import argparse

from cluster.cli import _checkpoint_export, _checkpoint_import, _checkpoint_ls, _checkpoint_verify

_ACTIONS = {
    "ls": _checkpoint_ls,
    "verify": _checkpoint_verify,
    "export": _checkpoint_export,
    "import": _checkpoint_import,
}


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
