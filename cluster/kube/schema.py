"""Check plain data against a TypedDict: every field known, there and of its type. Paths in messages name list items."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, cast, get_args, get_origin, get_type_hints, is_typeddict

NAME_KEYS = ("groupName", "name", "mountPath", "key", "port")
"""What tells the items of a list apart, the first that an item has."""


@dataclass(frozen=True)
class Pattern:
    """The whole text must match."""

    regex: str


@dataclass(frozen=True)
class MaxLength:
    """Characters at most."""

    length: int


@dataclass(frozen=True)
class Range:
    """Both ends included."""

    least: int
    most: int


def find_problems(value: object, kind: Any, path: str = "") -> Iterator[str]:
    """Yield one sentence per place where the value is not of the type; none if it is valid."""
    if get_origin(kind) is Annotated:
        base, *limits = get_args(kind)
        problems = list(find_problems(value, base, path))
        yield from problems or (p for limit in limits for p in _find_beyond(value, limit, path))
    elif is_typeddict(kind):
        yield from _find_in_fields(value, kind, path)
    elif get_origin(kind) is list:
        yield from _find_in_list(value, get_args(kind)[0], path)
    elif get_origin(kind) is dict:
        yield from _find_in_mapping(value, get_args(kind), path)
    elif get_origin(kind) is Literal:
        # True == 1 in Python, but not in YAML.
        if not any(value == allowed and type(value) is type(allowed) for allowed in get_args(kind)):
            yield f"{path}={value!r} must be {' or '.join(map(repr, get_args(kind)))}."
    elif kind is None:
        if value is not None:
            yield f"{path} must be empty (null), not {type(value).__name__}."
    elif type(value) is not kind:
        yield f"{path}={value!r} must be of type {kind.__name__}{', in quotes' if kind is str else ''}."


def name_item(item: object, index: int) -> str:
    """Return how a path calls an item of a list: by its name if it has one."""
    if isinstance(item, Mapping):
        named = cast(Mapping[str, object], item)
        for key in NAME_KEYS:
            if isinstance(named.get(key), str | int):
                return str(named[key])
    return str(index)


@cache
def _get_fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: get_args(hint)[0] if get_origin(hint) is NotRequired else hint for name, hint in hints.items()}
    return fields, cast(frozenset[str], kind.__required_keys__)


def _find_in_fields(value: object, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path}={value!r} must be a mapping."
        return
    fields, required = _get_fields(kind)
    prefix = f"{path}." if path else ""
    for key, item in cast(Mapping[str, object], value).items():
        if key in fields:
            yield from find_problems(item, fields[key], f"{prefix}{key}")
        else:
            near = get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Use one of: {', '.join(fields)}."
            yield f"{prefix}{key}: there is no such field in what Solvent writes. {hint}"
    for key in sorted(required - set(cast(Mapping[str, object], value))):
        yield f"{prefix}{key} is missing. Add it."


def _find_in_list(value: object, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{path}={value!r} must be a list."
        return
    for index, item in enumerate(cast(list[object], value)):
        yield from find_problems(item, kind, f"{path}[{name_item(item, index)}]")


def _find_in_mapping(value: object, kinds: tuple[Any, ...], path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path}={value!r} must be a mapping."
        return
    for key, item in cast(Mapping[object, object], value).items():
        yield from find_problems(key, kinds[0], f"key of {path}")
        yield from find_problems(item, kinds[1], f"{path}.{key}")


def _find_beyond(value: Any, limit: object, path: str) -> Iterator[str]:
    match limit:
        case Pattern(regex):
            if not re.fullmatch(regex, value):
                yield f"{path}={value!r} must match {regex}."
        case MaxLength(length):
            if len(value) > length:
                yield f"{path}={value!r} has {len(value)} characters; {length} are the most."
        case Range(least, most):
            if not least <= value <= most:
                yield f"{path}={value} must be between {least} and {most}."
        case _:
            raise AssertionError(limit)
