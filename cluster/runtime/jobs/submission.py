"""What of a run is sent to a Ray cluster: a small package, a command, and no secret. No Ray here."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.runtime.jobs.packing import pack
from elastic.config import RunConfig
from elastic.config_load import dump
from elastic.errors import ConfigError
from elastic.mixture import get_paths
from elastic.redact import redact
from elastic.storage import check_url, is_url

_FOLDER = ".solvent"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is sent for every attempt of a run."""

    run: str
    """`<storage>/<run>`: who else trains the same?"""
    prefix: str
    """Of the ids of its jobs."""
    package: bytes
    entrypoint: str
    env: Mapping[str, str]


def build_submission(
    config: RunConfig,
    *,
    folder: Path,
    excludes: Sequence[str],
    prices: str,
    secrets: Sequence[str],
    env: Mapping[str, str],
) -> Submission:
    """Pack what an attempt needs, and write its command.

    Args:
        prices: text of the file that cost.price_file names; it travels along.
        secrets: names of variables that the head must have; their values never travel.
        env: variables that travel; whoever may use the cluster can read them.

    Raises:
        ConfigError: this run would not find its files there, or a secret would be sent.
        StorageError: its storage is a URL of no known kind.
    """
    _check_paths(config)
    _check_secrets(config, secrets, env)
    added: dict[str, bytes] = {}
    if prices:
        added[f"{_FOLDER}/prices.yaml"] = prices.encode()
        config = dataclasses.replace(config, cost=dataclasses.replace(config.cost, price_file=f"{_FOLDER}/prices.yaml"))
    added[f"{_FOLDER}/config.yaml"] = dump(config).encode()
    run = f"{config.storage.rstrip('/')}/{config.run}"
    return Submission(
        run=run,
        prefix=f"solvent-{config.run}-{hashlib.sha256(run.encode()).hexdigest()[:8]}-",
        package=pack(folder, added=added, excludes=excludes),
        entrypoint=_build_entrypoint(secrets),
        env=env,
    )


def _check_paths(config: RunConfig) -> None:
    check_url(config.storage)
    for key, path in {"storage": config.storage, **get_paths(config.data)}.items():
        if not is_url(path) and not path.startswith("/"):
            raise ConfigError(
                f"{key}={path} would lie in the package that is unpacked on the cluster, and be gone with it. Set "
                f"{key} to an absolute path that all nodes see (a shared file system), or to an object store's URL."
            )


def _check_secrets(config: RunConfig, secrets: Sequence[str], env: Mapping[str, str]) -> None:
    fields = dataclasses.asdict(config)
    if redact(fields) != yaml.safe_load(yaml.safe_dump(fields)):
        raise ConfigError(
            "the configuration has a secret in it (a login in a URL), and it is sent to the cluster as it is. Take it "
            "out, and give the variable's name with --secret."
        )
    for name in [*secrets, *env]:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"--secret and --env take the name of a variable, not {name.partition('=')[0]!r} and a value: what is "
                "typed there is in the shell's history. Set the variable, and give its name."
            )
    for name in env:
        if redact({name: "x"}) != {name: "x"}:
            raise ConfigError(
                f"--env {name} looks like a secret, and Ray writes what travels into its logs. Start the head with "
                f"{name} in its environment, and say --secret {name} here."
            )


def _build_entrypoint(secrets: Sequence[str]) -> str:
    """Return the shell command; the driver takes the shell's place, so that signals reach it."""
    checks = [
        f'[ -n "${name}" ] || {{ echo {shlex.quote(_describe_missing(name))} >&2; exit 2; }}; ' for name in secrets
    ]
    return f"{''.join(checks)}exec solvent train {_FOLDER}/config.yaml"


def _describe_missing(name: str) -> str:
    return f"solvent: --secret {name}: it is not set on the head. Start Ray there with {name} in its environment."
