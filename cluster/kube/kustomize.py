"""The stream as files for `kubectl kustomize`: a base, and an overlay per profile made of patches by index.

A strategic-merge patch would replace all worker groups without a word: kustomize knows no schema of a RayJob. JSON
patches (RFC 6902) name the very item. The base is the generic profile's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from cluster.kube.manifests import Manifest
from cluster.kube.text import dump_documents

_HEADER = "Written by solvent render --kustomize; render again instead of editing."


def build_base(documents: Sequence[Manifest]) -> dict[str, str]:
    """Return the files below base/: one per document, and the kustomization."""
    files = {f"{_get_file(d)}.yaml": dump_documents([d], header=_HEADER) for d in documents}
    return {**files, "kustomization.yaml": _dump_kustomization({"resources": list(files)})}


def build_overlay(base: Sequence[Manifest], documents: Sequence[Manifest]) -> dict[str, str]:
    """Return the files of an overlay that makes the documents of the base into these.

    Documents that the base lacks become resources of the overlay; those that the documents lack are deleted.
    """
    wanted = {_get_file(document): document for document in documents}
    there = {_get_file(document): document for document in base}
    files = {f"{name}.yaml": dump_documents([d], header=_HEADER) for name, d in wanted.items() if name not in there}
    patches: list[dict[str, Any]] = []
    for name, document in there.items():
        target = {"kind": document["kind"], "name": document["metadata"]["name"]}
        if name not in wanted:
            patches.append(
                {"target": target, "patch": dump_documents([{**_get_identity(document), "$patch": "delete"}])}
            )
        elif operations := list(find_changes(document, wanted[name])):
            patches.append({"target": target, "patch": dump_documents(cast(Any, [operations]))})
    fields: dict[str, Any] = {"resources": ["../../base", *files]}
    if patches:
        fields["patches"] = patches
    return {**files, "kustomization.yaml": _dump_kustomization(fields)}


def find_changes(old: Any, new: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """Yield the JSON-patch operations that make `old` into `new`; lists change item by item, from the front."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        before, after = cast(Mapping[str, Any], old), cast(Mapping[str, Any], new)
        for key in before:
            inner = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key in after:
                yield from find_changes(before[key], after[key], inner)
            else:
                yield {"op": "remove", "path": inner}
        for key in after:
            if key not in before:
                yield {"op": "add", "path": f"{path}/{key.replace('~', '~0').replace('/', '~1')}", "value": after[key]}
    elif isinstance(old, list) and isinstance(new, list):
        first, second = cast(list[Any], old), cast(list[Any], new)
        for index, (one, other) in enumerate(zip(first, second, strict=False)):
            yield from find_changes(one, other, f"{path}/{index}")
        for index in range(len(first) - 1, len(second) - 1, -1):
            yield {"op": "remove", "path": f"{path}/{index}"}
        for item in second[len(first) :]:
            yield {"op": "add", "path": f"{path}/-", "value": item}
    elif old != new or type(old) is not type(new):
        yield {"op": "replace", "path": path, "value": new}


def _get_file(document: Manifest) -> str:
    return f"{document['kind'].lower()}-{document['metadata']['name']}"


def _get_identity(document: Manifest) -> Manifest:
    return {key: document[key] for key in ("apiVersion", "kind", "metadata")}


def _dump_kustomization(fields: dict[str, Any]) -> str:
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return dump_documents([{**kind, **fields}], header=_HEADER)
