"""The map of CONTRIBUTING leads where it says: `path::name` is defined in that file. A rename must come there, too."""

import ast
import re

import pytest

from tests.guide import ROOT

TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
MAP = re.search(r"^## The map\n(.*?)^## ", TEXT, re.DOTALL | re.MULTILINE)[1]
ROWS = [re.split(r" \| ", line.strip("| "), maxsplit=1) for line in MAP.splitlines() if re.match(r"\| \w.*\?", line)]
PLACES = sorted(set(re.findall(r"`((?:elastic|cluster|tests)/[\w/.]+)(?:::([\w.]+))?`", TEXT)))
TWELVE = {
    *("global batch", "replica server", "W&B run", "model family", "a strategy", "a provider", "snapshot interval"),
    *("communicator", "silent node", "my copy", "hung rank", "bad step"),
}
"""What a new engineer asks first."""


def is_defined(name: str, body: list[ast.stmt]) -> bool:
    """Say whether a module or class defines a function, class or constant; `Class.method` looks into the class."""
    first, _, rest = name.partition(".")
    for statement in body:
        match statement:
            case ast.ClassDef(name=own):
                if own == first:
                    return not rest or is_defined(rest, statement.body)
            case ast.FunctionDef(name=own) | ast.AsyncFunctionDef(name=own):
                if own == first:
                    return not rest
            case ast.Assign(targets=[ast.Name(id=own)]) | ast.AnnAssign(target=ast.Name(id=own)):
                if own == first:
                    return not rest
            case _:
                pass
    return False


def test_the_map_answers_the_twelve_questions_by_name():
    asked = [question for question, _ in ROWS]
    assert {word for word in TWELVE if any(word in question for question in asked)} == TWELVE
    assert all(re.search(r"`(?:elastic|cluster)/", answer) for _, answer in ROWS)


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_place_that_contributing_names_is_there(path, name):
    assert (ROOT / path).exists()
    if name:
        assert is_defined(name, ast.parse((ROOT / path).read_text()).body), f"{path} does not define {name}"
