"""The guide to rented machines says what was run and what was not, and each of its commands is one that we take."""

import shlex

import pytest

from cluster.cli import _parse as parse
from tests.guide import find_commands, get_kinds


def test_every_block_is_marked_as_run_or_not():
    assert get_kinds() == {"sh", "text"}
    assert len(find_commands("sh")) == 4 and len(find_commands("text")) == 3


@pytest.mark.parametrize("command", find_commands("sh") + find_commands("text"))
def test_every_command_is_one_that_we_take(command):
    words = shlex.split(command)
    assert words[0] == "solvent"
    assert parse(words[1:]).run
