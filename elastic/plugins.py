"""A file is its own registration: `strategies/ddp.py` is the kind `ddp`, with no list to keep in step."""

import ast
import importlib
import importlib.util
import pkgutil
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from elastic.errors import ConfigError


@cache
def get_names(package: str) -> tuple[str, ...]:
    """Return the kinds of a package such as ``elastic.strategies``, sorted, without importing any of them."""
    paths = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_")))


def check_name(package: str, kind: str, *, key: str) -> None:
    """Refuse a kind that no file of the package provides.

    Args:
        key: the configuration key that named it, for the message.

    Raises:
        ConfigError: unknown kind.
    """
    names = get_names(package)
    if kind not in names:
        near = get_close_matches(kind, names, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else f"Use one of: {', '.join(names)}."
        raise ConfigError(f"{key}={kind!r} is not known: there is no file {kind}.py in {package}. {hint}")


def load(package: str, kind: str, *, key: str) -> ModuleType:
    """Import the module that provides a kind.

    Raises:
        ConfigError: unknown kind.
    """
    check_name(package, kind, key=key)
    return importlib.import_module(f"{package}.{kind}")


@cache
def read_constant(package: str, kind: str, name: str) -> Any:
    """Return a literal that the file of a kind assigns to `name` at its top level, without importing it (and torch).

    None if it assigns none.
    """
    spec = importlib.util.find_spec(f"{package}.{kind}")
    assert spec is not None  # `check_name` has seen it
    assert spec.origin is not None
    for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                return ast.literal_eval(value)
            case _:
                continue
    return None
