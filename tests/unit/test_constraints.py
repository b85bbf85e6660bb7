"""What a field demands is said once, where it is, and read wherever a value comes from."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.constraints import NOT_NEGATIVE, POSITIVE, Constraint, Mark, check_fields, find_violation, get_marked
from elastic.errors import CheckpointError, ConfigError

EVEN = Constraint(
    holds=lambda value: value % 2 == 0, must="be even", why="it is cut in two", fix="Try {key}={default}."
)
SHAPE = Mark("shape")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    width: Annotated[int, POSITIVE, EVEN, SHAPE] = 8
    share: Annotated[float, NOT_NEGATIVE] = 0.5
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class MoreSizes(Sizes):
    depth: Annotated[int, SHAPE, POSITIVE] = 1


@given(width=st.integers(), share=st.floats(), depth=st.integers())
def test_a_dataclass_is_refused_exactly_if_some_field_does_not_hold(width, share, depth):
    sizes = MoreSizes(width=width, share=share, depth=depth)
    is_fine = width > 0 and width % 2 == 0 and 0 <= share < math.inf and depth > 0
    assert (find_violation(sizes, prefix="") is None) == is_fine
    if not is_fine:
        with pytest.raises(ConfigError):
            check_fields(sizes, prefix="", error=ConfigError)


def test_a_refusal_names_key_value_reason_and_fix():
    with pytest.raises(CheckpointError, match=r"^part\.width=3 must be even: it is cut in two\. Try part\.width=8\.$"):
        check_fields(Sizes(width=3), prefix="part.", error=CheckpointError)
    with pytest.raises(ConfigError, match=r"^share=nan must be finite and not negative\. Set share to 0 or more\.$"):
        check_fields(Sizes(share=math.nan), prefix="", error=ConfigError)


@pytest.mark.parametrize("value", ["8", None, [], {}])
def test_a_value_of_another_type_does_not_hold(value):
    assert find_violation(Sizes(width=value), prefix="") == f"width={value!r} must be finite and more than 0"


def test_marks_are_found_beside_constraints_and_in_what_is_inherited():
    assert get_marked(MoreSizes, SHAPE) == ("width", "depth")
    assert get_marked(MoreSizes, Mark("other")) == ()
