"""Where a path that somebody has typed leads: `~` is the home, and relative means relative to the working directory.

A path is resolved once, by the process that creates a run, a folder or a file; from then on it is absolute, and means
the same for processes elsewhere. URLs stay as they are.
"""

import os
import pwd
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from elastic.errors import ConfigError
from elastic.storage import is_url

STAND_IN = "solvent-home-"
"""The home of a user who has none, in the folder for temporary files."""


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


def ensure_home(env: MutableMapping[str, str]) -> str:
    """Give this process and its children a home to write to, if they have none; return what to say about it, or "".

    A container may run under any user id (OpenShift does), without a line in /etc/passwd and with HOME=/. Ray, W&B and
    compilers write to the home and ask for the name of the user, and end in tracebacks without.

    Raises:
        ConfigError: none can be made.
    """
    if not any(env.get(name) for name in ("LOGNAME", "USER")) and not _is_in_passwd():
        env["USER"] = f"user{os.getuid()}"
    home = env.get("HOME") or (pwd.getpwuid(os.getuid()).pw_dir if _is_in_passwd() else "")
    if home and os.access(home, os.W_OK | os.X_OK):
        env["HOME"] = home
        return ""
    made = Path(tempfile.gettempdir()) / f"{STAND_IN}{os.getuid()}"
    found = f"HOME={env['HOME']} cannot be written" if env.get("HOME") else "HOME is not set"
    try:
        made.mkdir(mode=0o700, exist_ok=True)
        status = made.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    except OSError as error:
        why = error.strerror
        raise ConfigError(f"{found}, and neither can {made} ({why}). Set HOME to a folder of this user's.") from error
    if not is_private:
        raise ConfigError(f"{found}, and {made} is not this user's alone. Set HOME to a folder of this user's.")
    env["HOME"] = str(made)
    return f"{found}; {made} takes its place"


def _is_in_passwd() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


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
