"""Real clusters on this machine; each in a folder of its own, in which nothing may be left."""

import pytest

from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from tests.ledgers import check_ledgers
from tests.ray._nodes import open_nodes


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The first hundred chapters of the King James Bible, as token shards."""
    folder = tmp_path_factory.mktemp("kjv")
    for number, chapter in enumerate(read_chapters()[:100]):
        (folder / f"{number}.txt").write_text(chapter)
    prepare([folder], folder / "data", vocab_size=512)
    return folder / "data"


@pytest.fixture(autouse=True)
def ledgers_add_up(request):
    """Every run that a test leaves in its folder is paid to the millisecond and the cent, however it was struck."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder:
        check_ledgers(folder)


@pytest.fixture(autouse=True, scope="session")
def all_ledgers_add_up(tmp_path_factory):
    """So are those that several tests share."""
    yield
    check_ledgers(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def nodes():
    """Three nodes that the tests of a module share."""
    with open_nodes(3) as nodes:
        yield nodes
