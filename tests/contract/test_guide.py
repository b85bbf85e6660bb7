"""Every command that a guide shows is one that we take, and every link leads somewhere."""

import argparse
import re
from pathlib import Path

import pytest

from cluster.cli import _parse as parse
from cluster.cli import build_parser
from elastic.config_load import load_here
from tests.guide import RENTED, ROOT, find_commands, find_inline, find_lines, list_guides, read_blocks, split

GUIDES = list_guides()
COMMANDS = {command: guide for guide in GUIDES for command in find_commands(guide, "sh", "text")}
SCRIPT = re.compile(
    r"(?:torchrun .*?|\S*python )(?:-m (?P<module>(?:tests|elastic)\b[\w.]*)|(?P<path>tests/\S+\.py))(?P<rest>.*)"
)


def list_options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and of those below it."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for below in action.choices.values() for option in list_options(below)}
    return found


def get_verbs() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(verbs.choices)


def list_shown() -> list[tuple[str, str]]:
    """Return every command line that is shown, in blocks and within lines, each with its guide."""
    return [(guide, line) for guide in GUIDES for line in [*find_lines(guide, "sh", "text"), *find_inline(guide)]]


def test_the_guides_are_found():
    assert {"README.md", ".github/CONTRIBUTING.md", RENTED, "elastic/README.md", "tests/README.md"} <= set(GUIDES)
    assert len(find_commands(RENTED, "sh")) == 4 and len(find_commands(RENTED, "text")) == 3
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_is_marked_as_run_or_not(guide):
    assert {kind for kind, _ in read_blocks(guide)} <= {"sh", "text", "python"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_call_of_solvent_is_one_that_we_take(command):
    args = parse(split(command)[1:])
    assert args.run
    config = Path(getattr(args, "config", None) or "")
    if config.suffix == ".yaml" and (ROOT / config).exists():
        load_here(ROOT / config, args.overrides)


def test_every_verb_and_option_within_a_line_is_one_of_ours():
    verbs, unknown = get_verbs(), []
    options = {name: list_options(parser) | {"--help"} for name, parser in verbs.items()}
    scripts = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    for guide in GUIDES:
        for code in find_inline(guide):
            words = split(code.removeprefix("solvent "))
            given = [word.partition("=")[0] for word in words if word.startswith("--")]
            if code.startswith("solvent ") and words[0] != "--help":
                names = words[0].split("/")
                unknown += [(guide, code) for name in names if name not in verbs]
            if words[0] in verbs:
                unknown += [(guide, code) for option in given if option not in options[words[0]]]
            elif words[0] in given:  # an option by itself
                known = any(words[0] in each for each in options.values())
                unknown += [] if known or f'"{words[0].partition("=")[0]}"' in scripts else [(guide, code)]
    assert not unknown


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {(guide, line.split()[1]) for guide, line in list_shown() if line.startswith("make ")}
    assert {target for _, target in shown} >= {"demo", "test"}
    assert not [(guide, target) for guide, target in shown if target not in targets]


def test_every_script_that_is_called_exists_and_takes_the_options_shown():
    unknown, num_seen = [], 0
    for guide, line in list_shown():
        if not (match := SCRIPT.match(line)):
            continue
        num_seen += 1
        name = match["path"] or match["module"].replace(".", "/") + ".py"
        path = ROOT / name if (ROOT / name).exists() else ROOT / name.removesuffix(".py") / "__main__.py"
        text = path.read_text() if path.exists() else ""
        given = re.findall(r"(?<!\S)--[a-z][a-z-]*", match["rest"])
        unknown += [(guide, line)] if not text else []
        unknown += [(guide, line, option) for option in given if f'"{option}"' not in text]
    assert num_seen > 10
    assert not unknown


def test_every_test_that_is_called_exists():
    for guide, line in list_shown():
        for path in re.findall(r"pytest (tests/\S+)", line):
            assert (ROOT / path).exists(), (guide, line)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(guide):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / guide).read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / guide).parent / path if path else ROOT / guide
        assert file.exists(), target
        assert not heading or heading in list_anchors(file), target


def list_anchors(file: Path) -> set[str]:
    """Return the headings of a guide as links call them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_stays_short_enough_for_a_newcomer():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert len([line for line in lines if line.startswith("|---")]) == 1
