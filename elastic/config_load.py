"""A configuration file and `key=value` overrides become one `RunConfig`, and back.

A configuration says where a run is, so it is read in one of two ways: `load` takes paths as they are written, for who
sends them elsewhere; `load_here` makes them absolute, for who creates or resumes the run on this machine.

Every value is checked against the type of its key, one key at a time, so that an error always names the key, the
value, and where it was written. An override is taken as the text typed: `run=007` stays `007`. Nothing is looked up
outside the file: what a run's `config.yaml` says is all there is to know, and no environment variable leaks into it.

omegaconf is imported where it is used: a machine without it can still train from a `RunConfig` built in Python.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from elastic.config import PhaseConfig, RunConfig, SourceConfig
from elastic.errors import ConfigError
from elastic.model_config import DEFAULT_KIND, MODEL_KIND, build_model_config
from elastic.paths import expand_home, resolve_path
from elastic.records.rundir import find_own_run

PATHS = ("storage", "data.path", "cost.price_file")
NODE_DISK = "checkpoint.node_disk"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
_NAMED = {
    "data.sources": (SourceConfig, re.compile(rf"data\.sources\.({_NAME})\.(path|weight)")),
    "data.phases": (PhaseConfig, re.compile(rf"data\.phases\.({_NAME})\.(from_tokens|from_step|weights\.{_NAME})")),
}
"""Sections whose entries have names that the user gives."""


class _Setting(NamedTuple):
    """One value on its way into the configuration, such as ("train.steps", "20", "on the command line")."""

    key: str
    value: Any
    origin: str


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides such as ``train.steps=20`` in order; keys left out keep their defaults.

    Raises:
        ConfigError: missing or malformed file, unknown key, wrong type, or values that contradict each other.
    """
    return _build([*_read_file(Path(path)), *_read_overrides(overrides)])


def load_here(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, for a run on this machine: every path becomes absolute.

    A relative path is relative to the working directory. In the `config.yaml` of a run's own directory, which earlier
    versions wrote with relative paths, it is relative to where the run was created.

    Raises:
        ConfigError: as `load`; or the file is a run's own and says that the run is elsewhere.
    """
    settings = _read_file(Path(path))
    own = find_own_run(Path(expand_home(str(path))), {key: value for key, value, _ in settings})
    typed = list(_read_overrides(overrides))
    if own and own.moved_from and not {"storage", "run"} & {setting.key for setting in typed}:
        raise ConfigError(
            f"{path} belongs to the run in {own.directory}, but says that it is {own.moved_from}: the run was moved or "
            f"copied, and another one would be resumed or begun from random weights. Add storage={own.directory.parent}"
            " to go on with the run that lies beside the file."
        )
    settings = [_resolve_setting(setting, base=own.created_in if own else None) for setting in settings]
    return resolve_paths(_build([*settings, *(_resolve_setting(setting, base=None) for setting in typed)]))


def build(overrides: Sequence[str]) -> RunConfig:
    """Return the defaults with overrides such as ``train.steps=20``, its paths absolute.

    Raises:
        ConfigError: unknown key, wrong type, or values that contradict each other.
    """
    return resolve_paths(_build(_resolve_setting(setting, base=None) for setting in _read_overrides(overrides)))


def resolve_paths(config: RunConfig) -> RunConfig:
    """Return the configuration for processes with other working directories."""
    sources = {
        name: dataclasses.replace(source, path=resolve_path(source.path))
        for name, source in config.data.sources.items()
    }
    data = dataclasses.replace(config.data, path=resolve_path(config.data.path), sources=sources)
    cost = dataclasses.replace(config.cost, price_file=resolve_path(config.cost.price_file))
    return dataclasses.replace(config, storage=resolve_path(config.storage), data=data, cost=cost)


def dump(config: RunConfig) -> str:
    """Return the YAML text of every knob; `load` turns it back into an equal configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _build(settings: Iterable[_Setting]) -> RunConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = list(settings)
    start = RunConfig(model=build_model_config(kind=_find_kind(settings)))
    building = OmegaConf.structured(start)
    for node in (building, *filter(OmegaConf.is_config, building.values())):
        OmegaConf.set_readonly(node, False)  # a frozen dataclass is read-only to omegaconf, even before it exists
    defaults = {**dict(_flatten(dataclasses.asdict(start))), **_add_named(building, settings)}
    for setting in settings:
        key, value, origin = setting
        _check_known(setting, defaults)
        _check_literal(setting, default=defaults[key])
        try:
            OmegaConf.update(building, key, value)
        except (OmegaConfBaseException, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{key}={value!r} ({origin}) cannot be used: {reason}. Write for example {key}={_text(defaults[key])}."
            ) from None
    return cast(RunConfig, OmegaConf.to_object(building))


def _add_named(building: Any, settings: Iterable[_Setting]) -> dict[str, Any]:
    """Make room for the sources and phases that settings name; return the defaults of their keys."""
    from omegaconf import OmegaConf

    defaults: dict[str, Any] = {}
    for key, _, _ in settings:
        for section, (kind, pattern) in _NAMED.items():
            found = pattern.fullmatch(key)
            if found is None:
                continue
            entries = OmegaConf.select(building, section)
            OmegaConf.set_readonly(entries, False)
            if found[1] not in entries:
                entries[found[1]] = kind()
                OmegaConf.set_readonly(entries[found[1]], False)
            defaults[key] = getattr(kind(), found[2]) if hasattr(kind(), found[2]) else 1.0
    return defaults


def _find_kind(settings: Sequence[_Setting]) -> str:
    """Return the family of models, which says what keys their section has: the last value wins, as everywhere.

    Raises:
        ConfigError: the value is no name.
    """
    kind = DEFAULT_KIND
    for setting in settings:
        if setting.key == MODEL_KIND:
            _check_literal(setting, default=DEFAULT_KIND)
            kind = setting.value
    return kind


def _resolve_setting(setting: _Setting, *, base: Path | None) -> _Setting:
    key, value, _ = setting
    if not isinstance(value, str):
        return setting
    if key == NODE_DISK:  # each node's own: a relative one is refused
        return setting._replace(value=expand_home(value))
    is_path = key in PATHS or (key.startswith("data.sources.") and key.endswith(".path"))
    return setting._replace(value=resolve_path(value, base=base)) if is_path else setting


def _read_file(path: Path) -> list[_Setting]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = Path(expand_home(str(path)))
    if not path.is_file():
        siblings = [str(p) for p in (path if path.is_dir() else path.parent).glob("*.y*ml")]
        near = difflib.get_close_matches(str(path), siblings, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Give the path of a YAML file, such as configs/demo.yaml."
        raise ConfigError(f"there is no configuration file {path}. {hint}")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read as YAML: {reason}. Write one `key: value` per line, each key once."
        ) from None
    content = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a list, not `key: value` lines. Start from configs/demo.yaml.")
    return [_Setting(key, value, f"in {path}") for key, value in _flatten(content)]


def _read_overrides(overrides: Sequence[str]) -> Iterator[_Setting]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} sets nothing: there is no value. Type key=value, such as train.steps=20.")
        yield _Setting(key.strip(), text, "on the command line")


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of every leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(cast(Mapping[Any, Any], value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_known(setting: _Setting, defaults: Mapping[str, Any]) -> None:
    key, value, origin = setting
    if key in defaults:
        return
    inside = [known for known in defaults if known.startswith(f"{key}.")]
    if inside:
        raise ConfigError(
            f"{key}={value!r} ({origin}) gives one value to a whole section. Set one of its keys, such as "
            f"{inside[0]}={_text(defaults[inside[0]])}."
        )
    same_name = [known for known in defaults if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name[:1] or difflib.get_close_matches(key, defaults, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Keys are: {', '.join(defaults)}."
    where = f" with model.kind={defaults[MODEL_KIND]}" if key.startswith("model.") else ""
    raise ConfigError(f"{key}={value!r} ({origin}): there is no such key{where}. {hint}")


def _check_literal(setting: _Setting, *, default: Any) -> None:
    """Refuse what omegaconf would replace by something else: references, markers, and numbers where text is due."""
    key, value, origin = setting
    if value is None or value == "???":
        raise ConfigError(f"{key} ({origin}) has no value. Write for example {key}={_text(default)}, or drop the line.")
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{key}={value!r} ({origin}) refers to something else, but a configuration must say by itself what ran. "
            f"Write the value, or let the shell fill it in: {key}=$NAME on the command line."
        )
    if isinstance(default, str) and not isinstance(value, str):
        raise ConfigError(
            f"{key}={value!r} ({origin}) is a {type(value).__name__}, but text is due and would be altered on the way. "
            f'Put it in quotes, {key}: "{value}", or write for example {key}={_text(default)}.'
        )


def _text(default: Any) -> str:
    """Return a default as it is typed; an empty one as a placeholder."""
    return str(default).lower() if isinstance(default, bool) else str(default) or "some-text"
