"""What W&B is told to do: the configuration where it says something, W&B's own environment where it does not.

Pure, and without wandb, which takes a second to import.

Source of the variables: docs.wandb.ai/models/track/environment-variables (wandb 0.31).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from elastic.config import RunConfig

Mode = Literal["offline", "online", "disabled"]

DEFAULT_PROJECT = "solvent"
_MODES: Mapping[str, Mode] = {
    "online": "online",
    "run": "online",  # as earlier clients called it
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_NO = ("", "0", "false", "no", "off")
_FIXED = {
    "WANDB_RUN_ID": "a run keeps one id over all its attempts",
    "WANDB_RESUME": "a run is resumed whenever it is trained again",
    "WANDB_CONSOLE": "what trainers print is not sent",
    "WANDB_SAVE_CODE": "code is not sent",
}
"""Variables that no key of the configuration answers, and why they are not followed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to pass to `wandb.init`; None: nothing, so that its environment counts."""

    mode: Mode
    project: str | None
    entity: str | None
    name: str | None
    dir: str | None
    overruled: tuple[str, ...]
    """Variables that are set and not followed, each with the reason."""


def choose(config: RunConfig, env: Mapping[str, str], *, folder: str) -> Choice:
    """Return what W&B is told.

    Args:
        folder: for its files, unless WANDB_DIR says where.
    """
    wanted, overruled = config.wandb, list[str]()
    mode, problem = _read_mode(env)
    if wanted.mode != "auto":
        if mode not in (None, wanted.mode):
            overruled.append(f"{_get_mode_variable(env)} (wandb.mode={wanted.mode})")
        mode = wanted.mode
    elif problem:
        overruled.append(problem)
    if mode != "disabled":
        overruled += [f"{name} ({why})" for name, why in _FIXED.items() if env.get(name)]
        overruled += _find_contradictions(config, env)
    return Choice(
        mode=mode or "offline",
        project=wanted.project or (None if env.get("WANDB_PROJECT") else DEFAULT_PROJECT),
        entity=wanted.entity or None,
        name=None if env.get("WANDB_NAME") else config.run,
        dir=None if env.get("WANDB_DIR") else folder,
        overruled=tuple(overruled),
    )


def _find_contradictions(config: RunConfig, env: Mapping[str, str]) -> list[str]:
    keys = (
        ("WANDB_PROJECT", "wandb.project", config.wandb.project),
        ("WANDB_ENTITY", "wandb.entity", config.wandb.entity),
    )
    return [
        f"{variable}={env[variable]} ({key}={value})"
        for variable, key, value in keys
        if value and env.get(variable) not in (None, "", value)
    ]


def _read_mode(env: Mapping[str, str]) -> tuple[Mode | None, str]:
    """Return the mode that the environment asks for, if any, and what is wrong with it."""
    if env.get("WANDB_DISABLED", "").lower() not in _NO:
        return "disabled", ""
    said = env.get("WANDB_MODE", "").lower()
    if said == "shared":
        return "online", "WANDB_MODE=shared (it loses rows of a run that goes back; online it is)"
    if said and said not in _MODES:
        return None, f"WANDB_MODE={said} (it is none of online, offline, disabled)"
    return _MODES.get(said), ""


def _get_mode_variable(env: Mapping[str, str]) -> str:
    is_disabled = env.get("WANDB_DISABLED", "").lower() not in _NO
    return f"WANDB_DISABLED={env['WANDB_DISABLED']}" if is_disabled else f"WANDB_MODE={env['WANDB_MODE']}"
