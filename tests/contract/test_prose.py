"""What docstrings, comments and guides name exists: a rename turns this red until the prose follows."""

import ast
import dataclasses
import re
import subprocess
import typing
from collections import defaultdict
from functools import cache
from pathlib import Path

from elastic.config import RunConfig

ROOT = Path(__file__).parents[2]
SECTIONS = {
    name: {field.name for field in dataclasses.fields(kind)}
    for name, kind in typing.get_type_hints(RunConfig).items()
    if dataclasses.is_dataclass(kind)
}
"""The sections of a configuration and their keys."""
FOREIGN = {"torch", "ray", "wandb", "transformers", "dcp", "nn", "dist", "pyarrow", "time"}
FILES_OF_OTHERS = re.compile(r".*(site-packages|torch/|ray/|modeling_|_hf_utils|dashboard/|scripts/|_bible)")


def list_files() -> list[str]:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listed.stdout.split("\n") if path and (ROOT / path).is_file()]


@cache
def read_prose() -> dict[str, str]:
    """Return the text of each guide, of the build's files and of the code, whose strings are messages and so prose."""
    return {
        path: (ROOT / path).read_text()
        for path in list_files()
        if path.endswith(".md")
        or path in ("Makefile", "pyproject.toml", ".ci/run", "k8s/Dockerfile")
        or (path.startswith(("elastic/", "cluster/")) and path.endswith(".py"))
    }


@cache
def get_defined() -> dict[str, set[str]]:
    """Return what each module (by its own name) and each class (by its name) defines."""
    defined: dict[str, set[str]] = defaultdict(set)
    for path, text in read_prose().items():
        if path.endswith(".py"):
            module = Path(path).stem if Path(path).stem != "__init__" else Path(path).parent.name
            add_names(defined, module, ast.parse(text).body)
    return defined


def add_names(defined: dict[str, set[str]], owner: str, body: list[ast.stmt]) -> None:
    for statement in body:
        match statement:
            case ast.ClassDef(name=name):
                defined[owner].add(name)
                add_names(defined, name, statement.body)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                defined[owner].add(name)
                stored = (node for node in ast.walk(statement) if isinstance(node, ast.Attribute))
                defined[owner] |= {node.attr for node in stored if isinstance(node.ctx, ast.Store)}
            case ast.Assign(targets=targets):
                defined[owner] |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                defined[owner].add(name)
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                defined[owner] |= {alias.asname or alias.name for alias in names}
            case _:
                pass


def exists(dotted: str) -> bool:
    """Say whether `module.name`, `Class.name` or `section.key` is one of ours, or nothing that could be ours."""
    *_, owner, name = dotted.split(".")
    if owner in SECTIONS and name in SECTIONS[owner]:
        return True
    defined = get_defined()
    if owner in defined and owner[0].isupper():
        return name in defined[owner]
    # a lone lower-case word may be a key of a manifest, a suffix or a method of a variable
    ours = any(name in names for names in defined.values()) and ("_" in name or not name.islower())
    return not (ours or (owner in SECTIONS and "_" in name)) or name in defined.get(owner, ())


def find_missing_names(text: str) -> list[str]:
    dotted = re.findall(r"`+([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`+", text)
    return [name for name in dotted if name.split(".")[0] not in FOREIGN and not exists(name)]


def find_missing_files(text: str, known: set[str]) -> list[str]:
    """Return what is not there: files, called by the end of their path, and paths that begin with a folder of ours."""
    ended = re.findall(r"(?<![\w<>*/.{}$-])(?:[\w.-]+/)*[a-z_]\w*\.(?:py|md)\b(?!\.)", text)
    begun = re.findall(r"(?<![\w<>*/.{}$-])(?:elastic|cluster|tests|k8s)/[\w/.-]*\w(?![\w<>*{}$-]|/[<*{])", text)
    named = ended + [path for path in begun if "//" not in path]
    return [name for name in named if not FILES_OF_OTHERS.match(name) and name not in known]


def list_known() -> set[str]:
    """Return every end of every file's path, and every folder."""
    paths = [Path(path) for path in list_files()]
    ends = {"/".join(path.parts[first:]) for path in paths for first in range(len(path.parts))}
    return ends | {str(folder) for path in paths for folder in path.parents}


def test_every_file_that_prose_names_exists():
    known = list_known()
    missing = {path: found for path, text in read_prose().items() if (found := find_missing_files(text, known))}
    assert not missing


def test_every_module_class_and_key_that_prose_names_has_what_it_says():
    missing = {path: found for path, text in read_prose().items() if (found := find_missing_names(text))}
    assert not missing
