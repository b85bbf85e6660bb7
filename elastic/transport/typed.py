"""Messages as frozen dataclasses: what comes is checked once, where it enters, and never again.

A message travels as the fields of its class with the class's name as "kind"; so does a dataclass within another one.
"""

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic.transport.frames import Header, WireError

Parser = Callable[[Any], Any]
_M = TypeVar("_M")


class Vocabulary(Generic[_M]):
    """The messages that one side of a connection may say.

    Args:
        kinds: dataclasses with fields of str, int, float, bool, None, Literal, tuple, Sequence, Mapping with keys of
            str, unions of these, other such dataclasses, and `object` for any JSON value.
    """

    def __init__(self, *kinds: type[_M]) -> None:
        self._parsers = {kind.__name__: _build_class_parser(kind) for kind in kinds}

    def parse(self, header: Header) -> _M:
        """Return a message that has come.

        Raises:
            WireError: nobody of ours says this.
        """
        try:
            return self._parsers[header["kind"]](header)
        except KeyError:
            raise WireError(f"{header['kind'][:100]!r} is no message that is said here") from None
        except (ValueError, OverflowError, RecursionError) as error:
            raise WireError(f"a {header['kind']} of another form is none of ours: {error}") from error


def to_header(message: object) -> Header:
    """Return a message for `frames.encode`."""
    return {"kind": type(message).__name__, **vars(message)}


def build_parser(hint: Any) -> Parser:  # noqa: PLR0911 (one line for each kind of type)
    """Return what checks a JSON value against a type and makes one of that type, or raises ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return lambda value: value
    if hint is float:
        return _parse_float
    if hint in (str, int, bool, types.NoneType):
        return _build_exact_parser(hint)
    if origin is Literal:
        return _build_literal_parser(args)
    if origin in (Union, types.UnionType):
        return _build_union_parser(args)
    if origin is tuple:
        return _build_tuple_parser(args)
    if origin is not None and issubclass(origin, Sequence):
        return _build_tuple_parser((args[0], ...))
    if origin is not None and issubclass(origin, Mapping):
        return _build_mapping_parser(args[1])
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _build_class_parser(hint)
    raise TypeError(f"a message cannot hold a {hint}")


def _refuse(value: object, wanted: object) -> ValueError:
    return ValueError(f"{repr(value)[:100]} is no {wanted}")


def _build_exact_parser(kind: type) -> Parser:
    def parse(value: Any) -> Any:
        if type(value) is not kind:  # True is no int here
            raise _refuse(value, kind.__name__)
        return value

    return parse


def _parse_float(value: Any) -> float:
    if type(value) not in (float, int):
        raise _refuse(value, "number")
    return float(value)


def _build_literal_parser(choices: Sequence[object]) -> Parser:
    def parse(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(value, f"one of {choices}")
        return value

    return parse


def _build_union_parser(hints: Sequence[Any]) -> Parser:
    parsers = [build_parser(hint) for hint in hints]

    def parse(value: Any) -> Any:
        for each in parsers[:-1]:
            with contextlib.suppress(ValueError):
                return each(value)
        return parsers[-1](value)

    classes: list[type] = [hint for hint in hints if isinstance(hint, type) and is_dataclass(hint)]
    if len(classes) < 2:
        return parse
    by_kind = {hint.__name__: _build_class_parser(hint) for hint in classes}  # no exceptions on the way

    def parse_class(value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # JSON
        if not isinstance(kind, str) or kind not in by_kind:
            raise _refuse(value, f"one of {list(by_kind)}")
        return by_kind[kind](value)

    return parse_class if len(classes) == len(hints) else parse


def _build_tuple_parser(hints: Sequence[Any]) -> Parser:
    if len(hints) == 2 and hints[1] is Ellipsis:
        of = build_parser(hints[0])
        return lambda value: tuple(of(each) for each in _get_list(value))
    parsers = [build_parser(hint) for hint in hints]

    def parse(value: Any) -> Any:
        if len(_get_list(value)) != len(parsers):
            raise _refuse(value, f"list of {len(parsers)}")
        return tuple(of(each) for of, each in zip(parsers, value, strict=True))

    return parse


def _get_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _refuse(value, "list")
    return value  # pyright: ignore[reportUnknownVariableType] # JSON


def _build_mapping_parser(hint: Any) -> Parser:
    of = build_parser(hint)

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _refuse(value, "object")
        return {key: of(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType] # JSON

    return parse


def _build_class_parser(kind: type) -> Parser:
    hints = get_type_hints(kind)
    parsers = {each.name: build_parser(hints[each.name]) for each in fields(kind)}
    required = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}

    def parse(value: Any) -> Any:
        if not isinstance(value, dict) or value.get("kind") != kind.__name__:  # pyright: ignore[reportUnknownMemberType] # JSON
            raise _refuse(value, kind.__name__)
        found: dict[str, Any] = {}
        for name, part in value.items():  # pyright: ignore[reportUnknownVariableType] # JSON
            if name == "kind":
                continue
            if name not in parsers:
                raise ValueError(f"it has a {repr(name)[:100]}")
            found[name] = parsers[name](part)
        if missing := required - found.keys():
            raise ValueError(f"it has no {sorted(missing)[0]!r}")
        return kind(**found)

    return parse
