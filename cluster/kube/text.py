"""Manifests as YAML that every reader takes alike."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from cluster.kube.manifests import Manifest

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/._-]*([ :=]+[A-Za-z0-9/._-]+)*")
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some reader might take for something else, and indents lists as people do."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:  # noqa: ARG002 (PyYAML's signature)
        return super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # YAML 1.1 and 1.2, in Python and in Go, disagree on 1e3, 0o7, 12:30, y and no; nobody disagrees on quotes.
    if "\n" in text:
        style = "|"
    else:
        style = None if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and ": " not in text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_documents(documents: Iterable[Manifest], *, header: str = "") -> str:
    """Return a stream of documents; the same text for the same documents."""
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True)
    return "".join(f"# {line}\n" for line in header.splitlines()) + body
