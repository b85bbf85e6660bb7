"""Keep secrets out of everything a run leaves behind."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = re.compile(r"(^|[_-])(token|secret|password|passwd|key|credentials?)$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(value: Any) -> Any:
    """Return a copy of nested mappings and lists with secrets replaced by ``[redacted]``.

    A secret is the value of a key that ends in ``token``, ``secret``, ``password``, ``key`` or ``credentials``
    (counts such as ``warmup_tokens`` are none), or the login part of a URL.
    """
    if isinstance(value, Mapping):
        return {k: "[redacted]" if v and _SECRET_KEY.search(str(k)) else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _URL_LOGIN.sub("[redacted]", value) if isinstance(value, str) else value
