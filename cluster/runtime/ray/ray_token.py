"""The token that opens a Ray cluster, found where Ray itself looks for it. No Ray here; never printed.

Source: docs.ray.io/en/latest/ray-security/token-auth.html (2.60).
"""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from elastic.errors import ConfigError

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


def read_token(env: Mapping[str, str]) -> str:
    """Return the token; empty if there is none, or if this environment turns tokens off (RAY_AUTH_MODE=disabled).

    Raises:
        ConfigError: the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if env.get(MODE, "token").lower() != "token":
        return ""
    if token := env.get(TOKEN, "").strip():
        return token
    if named := env.get(TOKEN_PATH, ""):
        try:
            return Path(named).read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"{TOKEN_PATH}={named} cannot be read ({error.strerror}), so the cluster would not let us in. Copy the "
                f"head's token there, or set {TOKEN}."
            ) from error
    try:
        return get_default_path(env).read_text().strip()
    except OSError:
        return ""


def explain_refusal(address: str, env: Mapping[str, str]) -> ConfigError:
    """Return what it means that a cluster does not let us in."""
    own = get_default_path(env)
    what_to_do = f"Copy the head's ~/.ray/auth_token to {own}, or set {TOKEN}."
    wants = f"RAY_ADDRESS={address}: this cluster lets nobody in without its token"
    if env.get(MODE, "token").lower() != "token":
        return ConfigError(f"{wants}, and {MODE}={env[MODE]} keeps Ray from showing one. Unset {MODE}. {what_to_do}")
    if not read_token(env):
        why = f"{MODE}={env[MODE]}, but there is no token here" if MODE in env else f"{wants}, and there is none here"
        return ConfigError(f"{why}. {what_to_do}")
    source = TOKEN if env.get(TOKEN, "").strip() else env.get(TOKEN_PATH, "") or str(own)
    return ConfigError(f"{wants}, and the one in {source} is another. {what_to_do}")


def get_default_path(env: Mapping[str, str]) -> Path:
    """Return where Ray keeps the token of a user."""
    return Path(env.get("HOME") or Path.home()) / ".ray" / "auth_token"


def make_first_token(env: Mapping[str, str]) -> None:
    """Make the token of a cluster of our own, unless there is one: Ray would make it readable for everybody."""
    if env.get(MODE, "token").lower() == "token" and not read_token(env):
        with contextlib.suppress(FileExistsError):  # another process was faster
            make_token(get_default_path(env))


def make_token(path: Path) -> None:
    """Write a new token that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
