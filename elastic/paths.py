"""Where a path that somebody has typed leads: `~` is the home, and relative means relative to the working directory.

A path is resolved once, by the process that creates a run, a folder or a file; from then on it is absolute, and means
the same for processes elsewhere. URLs stay as they are.
"""

import os
from pathlib import Path

from elastic.errors import ConfigError
from elastic.storage import is_url


def expand_home(text: str) -> str:
    """Return a path with `~` or `~user` at its start replaced; a shell leaves it alone in `--out=~/x` and `key=~/x`.

    Raises:
        ConfigError: nobody knows whose home that is.
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111 (pathlib raises RuntimeError, and drops a trailing slash)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{text} begins with a home that is not known here (HOME is not set, or there is no such user), and would "
            "become a folder of that name. Write the whole path."
        )
    return expanded


def resolve_path(text: str, *, base: Path | None = None) -> str:
    """Return a path as an absolute one without links, so that two names of a folder are one; URLs and "" stay.

    Args:
        base: what a relative path is relative to; the working directory unless given.

    Raises:
        ConfigError: as `expand_home`.
    """
    if not text or is_url(text):
        return text
    return str(((base or Path()) / expand_home(text)).resolve())
