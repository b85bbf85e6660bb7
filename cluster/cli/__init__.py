"""The `solvent` command: one file per verb; nothing slow is imported before it is needed.

A verb is a module of this package: the first line of its docstring is its help, `add_arguments(parser)` declares what
it takes and `run(args)` does it and returns the exit code. It imports torch, ray and the like inside `run` only.
"""

import argparse
import atexit
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

from elastic import plugins
from elastic.errors import SolventError
from elastic.paths import ensure_home, expand_home

INTERRUPTED_BY_KEYBOARD = 130
"""128 + SIGINT, as shells report it."""
_HOME = re.compile(r"~[^/]*/")


class Verb(Protocol):
    """What a module of this package provides."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the verb takes."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit code; a `SolventError` brings its own."""
        ...


def load_verb(name: str) -> Verb:
    """Import the module of a verb."""
    return cast(Verb, plugins.load(__name__, name, key="verb"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with one sub-parser per verb."""
    parser = argparse.ArgumentParser(prog="solvent", description="Elastic training on cheap, unreliable GPUs.")
    parser.add_argument(
        "--debug",
        action="store_true",
        default=bool(os.environ.get("SOLVENT_DEBUG")),
        help="show where an error came from (also SOLVENT_DEBUG=1)",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in plugins.get_names(__name__):
        verb = load_verb(name)
        summary = (verb.__doc__ or "").partition("\n")[0]
        sub = verbs.add_parser(name, help=summary, description=verb.__doc__)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; key=value may stand anywhere, where argparse wants all of them in one place."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _expand_homes(args: argparse.Namespace) -> None:
    """Replace `~` at the start of every argument that is a path; overrides are the configuration's own.

    Raises:
        ConfigError: there is no such home.
    """
    for name, value in vars(args).items():
        if isinstance(value, str | Path) and _HOME.match(str(value)):
            setattr(args, name, type(value)(expand_home(str(value))))
        elif isinstance(value, list) and name == "inputs":
            args.inputs = [expand_home(item) if _HOME.match(item) else item for item in args.inputs]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; an error raised on purpose becomes one line on stderr."""
    args = _parse(argv)
    try:
        if notice := ensure_home(os.environ):
            print(f"solvent: {notice}", file=sys.stderr)
        _expand_homes(args)
        return args.run(args)
    except SolventError as error:
        if args.debug:
            traceback.print_exc()
        print(f"solvent: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_BY_KEYBOARD


def enter() -> NoReturn:
    """Be the command: run one verb and end the process with its exit code.

    Ray's threads are not all gone when `ray.shutdown` returns, and some bring the interpreter down while it ends: a
    driver that had said why it gave up was seen to return SIGSEGV. So all that is registered for the end is done here,
    and nothing is left to the interpreter's own.
    """
    code = main()
    if "ray" in sys.modules:
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] # no public way to run them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
