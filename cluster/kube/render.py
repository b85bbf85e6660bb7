"""A configuration and options become a checked stream of manifests."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from cluster.kube.manifests import KINDS, Manifest
from cluster.kube.options import Options
from cluster.kube.override import apply_overrides
from cluster.kube.pods import CONFIG_FOLDER
from cluster.kube.rules import check_stream
from cluster.kube.text import dump_documents
from elastic import plugins
from elastic.config import RunConfig, from_dict
from elastic.errors import ConfigError

_PACKAGE = "cluster.kube.profiles"
_PRICES = "prices.yaml"


class Profile(Protocol):
    """What a file of `profiles/` provides."""

    def render(self, config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
        """Return the documents for this place."""
        ...


def get_profile_names() -> list[str]:
    """Return what `--profile` takes."""
    return [name.replace("_", "-") for name in plugins.get_names(_PACKAGE)]


def render(
    config: RunConfig,
    profile: str,
    options: Options,
    *,
    prices: str = "",
    fragments: Sequence[Manifest] = (),
) -> list[Manifest]:
    """Return the checked documents of a run.

    Args:
        prices: text of the file that cost.price_file names; it travels along.
        fragments: overrides, see override.py.

    Raises:
        ConfigError: unknown profile, or a run, options or overrides that cannot work there.
    """
    module = cast(Profile, plugins.load(_PACKAGE, profile.replace("-", "_"), key="--profile"))
    files: dict[str, str] = {}
    if prices:
        files[_PRICES] = prices
        cost = dataclasses.replace(config.cost, price_file=f"{CONFIG_FOLDER}/{_PRICES}")
        config = dataclasses.replace(config, cost=cost)
    files["config.yaml"] = dump_documents([get_changes(dataclasses.asdict(config), _get_defaults(config))])
    documents = module.render(config, options, files)
    if not is_kubernetes(documents):
        if fragments:
            raise ConfigError(f"--override changes Kubernetes manifests; --profile {profile} writes none. Drop it.")
        return documents
    documents = apply_overrides(documents, fragments)
    check_stream(documents)
    return documents


def _get_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the defaults of each key that the configuration has; those of the model's are its family's."""
    family = dataclasses.asdict(from_dict({"model": {"kind": config.model.kind}}))
    return {**family, "model": {**family["model"], "kind": RunConfig().model.kind}}


def get_changes(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what differs from the defaults, which are those of the image, and so the same for every attempt."""
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            if inner := get_changes(cast(dict[str, Any], value), defaults.get(name, {})):
                changes[name] = inner
        elif name not in defaults or value != defaults[name]:  # sources and phases have the user's names
            changes[name] = value
    return changes


def is_kubernetes(documents: Sequence[Manifest]) -> bool:
    """Whether these are manifests, and not a task for a tool that rents nodes."""
    return all(document.get("kind") in KINDS for document in documents)
