"""Refuse runs whose files, or whose secrets, would not be where the pods look for them."""

import dataclasses
import re
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from cluster.kube.options import Options
from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.mixture import get_paths
from elastic.redact import redact
from elastic.storage import OBJECT_STORES

_SECRET_IN_QUERY = re.compile(r"key|secret|token|password|sig|credential", re.IGNORECASE)


def check_placement(config: RunConfig, options: Options) -> None:
    """Check that every node reaches the storage and the data, and that no secret is written down.

    Raises:
        ConfigError: one of them does not hold.
    """
    if not options.image:
        raise ConfigError(
            "there is no image to start. Build k8s/Dockerfile, push it, and name it: "
            "--set image=registry.example.com/solvent:0.1.0."
        )
    _check_no_secret(config, options)
    scheme = urlsplit(config.storage).scheme
    if scheme not in OBJECT_STORES and not _is_shared(config.storage, options):
        raise ConfigError(
            f"storage={config.storage} would be in a container that is gone with its node, and the run with it. Set "
            f"storage=s3://BUCKET/runs (or gs://, az://), or --set claim=NAME with storage={options.claim_path}/runs."
        )
    for key, path in get_paths(config.data).items():
        if urlsplit(path).scheme not in OBJECT_STORES and not _is_shared(path, options):
            raise ConfigError(
                f"{key}={path!r} is not in a container. Copy the prepared folder to an object store "
                f"({key}=s3://BUCKET/data), or to a shared volume: --set claim=NAME {key}={options.claim_path}/data."
            )
    if config.wandb.mode == "online" and not (options.secret or options.secret_names):
        raise ConfigError(
            "wandb.mode=online needs WANDB_API_KEY in the pods. Put it into a Secret and --set secret=NAME (renting "
            "tools: --set secret_env=WANDB_API_KEY), or set wandb.mode=offline."
        )


def _is_shared(path: str, options: Options) -> bool:
    return bool(options.claim) and f"{path}/".startswith(f"{options.claim_path}/") and ".." not in path.split("/")


def _check_no_secret(config: RunConfig, options: Options) -> None:
    settings = [("--set claim", options.claim)]
    for key, value in [*_flatten(dataclasses.asdict(config)), *settings]:
        has_login = redact(value) != value
        query = urlsplit(value).query if isinstance(value, str) and "://" in value else ""
        names = [name for name, _ in parse_qsl(query, keep_blank_values=True) if _SECRET_IN_QUERY.search(name)]
        if has_login or names:
            raise ConfigError(
                f"{key} has a secret in it{f' ({names[0]})' if names else ''}, and manifests are read by many. Take it "
                "out, put it into a Secret and --set secret=NAME (renting tools: --set secret_env=NAME)."
            )


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves += _flatten(cast(dict[str, Any], value), f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves
