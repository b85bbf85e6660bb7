"""What the value of a field must be beyond its type, said once, where the field is: `steps: Annotated[int, POSITIVE]`.

A configuration is refused by it (`elastic/config.py`), and so is what a file says of itself (manifests).
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from elastic.errors import SolventError


@dataclass(frozen=True)
class Mark:
    """Says of a field what it is for, and demands nothing."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One demand; `fix` may name the `{key}` and its `{default}`."""

    holds: Callable[[Any], bool]
    must: str
    """What the value must do, after "must"."""
    why: str = ""
    fix: str

    def explain(self, key: str, value: object) -> str:
        """Return what is wrong with a value that does not hold."""
        reason = f": {self.why}" if self.why else ""
        return f"{key}={value!r} must {self.must}{reason}"


POSITIVE = Constraint(
    holds=lambda value: 0 < value < math.inf,
    must="be finite and more than 0",
    fix="Set {key} to a positive number.",
)
NOT_NEGATIVE = Constraint(
    holds=lambda value: 0 <= value < math.inf,
    must="be finite and not negative",
    fix="Set {key} to 0 or more.",
)


def check_fields(instance: object, *, prefix: str, error: type[SolventError]) -> None:
    """Refuse a dataclass with a field that does not hold what its annotation demands, and say what to type instead.

    Args:
        prefix: before the name of the field in the message, such as ``train.``.

    Raises:
        SolventError: of the class `error`.
    """
    for name, constraint, default in _list_constraints(type(instance)):
        if not _holds(constraint, value := getattr(instance, name)):
            key = f"{prefix}{name}"
            raise error(f"{constraint.explain(key, value)}. {constraint.fix.format(key=key, default=default)}")


def find_violation(instance: object, *, prefix: str) -> str | None:
    """Return what is wrong with the first field that does not hold what its annotation demands, if one does not."""
    for name, constraint, _ in _list_constraints(type(instance)):
        if not _holds(constraint, value := getattr(instance, name)):
            return constraint.explain(f"{prefix}{name}", value)
    return None


def get_marked(kind: type, mark: Mark) -> tuple[str, ...]:
    """Return the names of the fields whose annotation carries a mark."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(each.name for each in fields(kind) if mark in getattr(hints[each.name], "__metadata__", ()))


def _holds(constraint: Constraint, value: object) -> bool:
    try:
        return constraint.holds(value)
    except TypeError:  # a file may say anything
        return False


@cache
def _list_constraints(kind: type) -> tuple[tuple[str, Constraint, object], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (each.name, mark, None if each.default is MISSING else each.default)
        for each in fields(kind)
        for mark in getattr(hints[each.name], "__metadata__", ())
        if isinstance(mark, Constraint)
    )
