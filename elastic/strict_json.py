"""JSON as RFC 8259 has it: what is not finite is null.

Python writes bare `NaN` and `Infinity` by default, which no strict parser takes (jq, pandas, JavaScript, Go), and they
turn up exactly when somebody looks at what went wrong. A row says in other columns why a number is missing, as
`bad_step` does. Files of earlier versions hold the bare words; both are read as None.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def dump_json(value: object, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """Return the JSON text of a value; numbers that are not finite become null, at any depth."""
    return json.dumps(_replace_not_finite(value), indent=indent, separators=separators, allow_nan=False)


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, with None for what is not finite.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(text, parse_constant=lambda _: None)


def _replace_not_finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _replace_not_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_not_finite(item) for item in value]
    return value
