"""Change a rendered stream by a YAML file of fragments, merged by name: what they leave out stays as it is.

A fragment names its `kind` (and `metadata.name` where there are several of a kind). Mappings merge key by key, lists of
named things (worker groups by `groupName`, containers, volumes and variables by `name`) item by item, other lists are
replaced, null removes. A group or container that does not exist is refused: it is a typing error.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml

from cluster.kube.manifests import Manifest
from cluster.kube.schema import NAME_KEYS
from elastic.errors import ConfigError

_CLOSED = ("workerGroupSpecs", "containers")
"""Lists that cannot grow by an override."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML itself would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            mapping[key] = None
        return super().construct_mapping(node, deep)


def read_overrides(path: Path) -> list[Manifest]:
    """Read the fragments of a file.

    Raises:
        ConfigError: no such file, no YAML, or a fragment that names no kind.
    """
    try:
        documents = [document for document in yaml.load_all(path.read_text(), _StrictLoader) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--override {path} cannot be read: {reason}. Name a YAML file with fragments such as `kind: RayJob`."
        ) from None
    for document in documents:
        if not isinstance(document, dict) or not isinstance(cast(Manifest, document).get("kind"), str):
            raise ConfigError(f"--override {path} has a fragment without kind. Add a line such as `kind: RayJob`.")
    return documents


def apply_overrides(documents: Sequence[Manifest], fragments: Sequence[Manifest]) -> list[Manifest]:
    """Return the stream with every fragment merged into the document that it names; nothing is changed in place.

    Raises:
        ConfigError: a fragment names nothing in the stream, or more than one document.
    """
    changed = list(documents)
    for fragment in fragments:
        name: Any = cast(dict[str, Any], fragment.get("metadata") or {}).get("name")
        found = [
            index
            for index, document in enumerate(changed)
            if document["kind"] == fragment["kind"] and name in (None, document["metadata"]["name"])
        ]
        if len(found) != 1:
            there = ", ".join(f"{document['kind']} {document['metadata']['name']}" for document in documents)
            raise ConfigError(
                f"the override of {fragment['kind']} {name or ''} names {len(found)} documents, not one. There are: "
                f"{there}."
            )
        changed[found[0]] = _merge(changed[found[0]], fragment, fragment["kind"])
    return changed


def _merge(base: Any, change: Any, path: str) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        merged = cast(dict[str, Any], base).copy()
        for key, value in cast(dict[str, Any], change).items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = _merge(merged[key], value, f"{path}.{key}") if key in merged else value
        return merged
    if isinstance(base, list) and isinstance(change, list):
        return _merge_lists(cast(list[Any], base), cast(list[Any], change), path)
    return change


def _merge_lists(base: list[Any], change: list[Any], path: str) -> list[Any]:
    items = [cast(dict[str, Any], item) for item in [*base, *change] if isinstance(item, dict)]
    keys = [key for key in NAME_KEYS[:2] if items and all(key in item for item in items)]
    if not keys or len(items) < len(base) + len(change):
        return change
    merged: dict[str, Any] = {item[keys[0]]: item for item in base}
    for item in change:
        name = item[keys[0]]
        if name not in merged and path.endswith(_CLOSED):
            near = get_close_matches(str(name), merged, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(merged)}."
            raise ConfigError(f"{path}[{name}] (in an override) does not exist. {hint}")
        merged[name] = _merge(merged[name], item, f"{path}[{name}]") if name in merged else item
    return list(merged.values())
