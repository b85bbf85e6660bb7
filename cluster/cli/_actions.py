"""Verbs with actions of their own: `solvent checkpoint ls`, `solvent nodes join`."""

import argparse
from collections.abc import Mapping
from types import ModuleType


def add_actions(parser: argparse.ArgumentParser, actions: Mapping[str, ModuleType]) -> None:
    """Take an action and what it takes.

    Args:
        actions: by name; each has what a verb has, `add_arguments` and `run`.
    """
    subparsers = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action in actions.items():
        summary = (action.__doc__ or "").partition("\n")[0]
        sub = subparsers.add_parser(name, help=summary, description=action.__doc__)
        action.add_arguments(sub)
        sub.set_defaults(act=action.run)
