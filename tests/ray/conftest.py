"""Real clusters on this machine; each in a folder of its own, in which nothing may be left."""

import pytest

from elastic.data.kjv import read_chapters
from elastic.data.prepare import prepare
from tests.ray._nodes import open_nodes


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The first hundred chapters of the King James Bible, as token shards."""
    folder = tmp_path_factory.mktemp("kjv")
    for number, chapter in enumerate(read_chapters()[:100]):
        (folder / f"{number}.txt").write_text(chapter)
    prepare([folder], folder / "data", vocab_size=512)
    return folder / "data"


@pytest.fixture(scope="module")
def nodes():
    """Three nodes that the tests of a module share."""
    with open_nodes(3) as nodes:
        yield nodes
